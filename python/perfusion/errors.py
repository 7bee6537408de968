"""What messages are made of: advice for two readers, who calls Python and who types a command; lists cut short; `UnsupportedPipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

__all__ = ["UnsupportedPipeline", "advise", "few", "for_command_line"]

_Error = TypeVar("_Error", bound=Exception)


class UnsupportedPipeline(ValueError):
    """A pipeline that Perfusion cannot edit. The message names the part that stands in the way and what is supported."""


def advise(error: _Error, *, python: str, command: str) -> _Error:
    """The error, its sentence followed by the advice for Python; the command line shows it with its own."""
    error._command_line = f"{error} {command}"
    error.args = (f"{error} {python}",)
    return error


def for_command_line(error: Exception) -> str:
    """What the command line says of an error."""
    return getattr(error, "_command_line", str(error))


def few(names: Sequence[str], count: int, between: str = ", ") -> str:
    """The first `count` of some names, and how many more there are."""
    return between.join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
