"""One error, and for each of its two readers what to do about it: for who calls Python, and for who types a command."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["advise", "for_command_line"]

_Error = TypeVar("_Error", bound=Exception)


def advise(error: _Error, *, python: str, command: str) -> _Error:
    """The error, its sentence followed by the advice for Python; the command line shows it with its own."""
    error._command_line = f"{error} {command}"
    error.args = (f"{error} {python}",)
    return error


def for_command_line(error: Exception) -> str:
    """What the command line says of an error."""
    return getattr(error, "_command_line", str(error))
