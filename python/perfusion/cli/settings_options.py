"""Options of a command that are the fields of a dataclass: names, help and defaults stand there alone."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Optional

import typer

__all__ = ["takes_settings"]

_TYPES = {"int": int, "int | None": int, "float": float, "bool": bool, "str": str, "tuple[str, ...]": list[str]}
_SAID = {True: "on", False: "off"}


def takes_settings(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command has an option for every field of `kind` instead of its `**settings`, and gets those that were given.

    Fields without a default come first, behind the command's arguments.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        fields = dataclasses.fields(kind)
        groups = (
            [each for each in own if each.default is each.empty],
            [_parameter(field) for field in fields if field.default is dataclasses.MISSING],
            [each for each in own if each.default is not each.empty],
            [_parameter(field) for field in fields if field.default is not dataclasses.MISSING],
        )
        command.__signature__ = signature.replace(parameters=[each for group in groups for each in group])
        return command

    return decorate


def _parameter(field: dataclasses.Field) -> inspect.Parameter:
    """None stands for what was not given, so that a file of settings can be told from a default."""
    option = field.name.replace("_", "-")
    names = field.metadata["names"] or ((f"--{option}/--no-{option}",) if field.type == "bool" else (f"--{option}",))
    said = field.metadata["said"] or (_SAID[field.default] if field.type == "bool" else field.default)
    default = "" if said in (dataclasses.MISSING, "") else f" [default: {said}]"
    information = typer.Option(*names, help=field.metadata["help"] + default, show_default=False)
    annotation = Annotated[Optional[_TYPES[field.type]], information]
    return inspect.Parameter(field.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)
