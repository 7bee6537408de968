"""The command `perfusion`. A subcommand is the function of its own name in the module of its own name beside this file.

Modules are imported when their command is called, and what they need when it runs: `perfusion --help` imports no torch.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from inspect import getdoc  # the module's own name is a command's, here
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from perfusion.cli.threads import core_limit, set_threads
from perfusion.files import user_path

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = {
    "demo": "See it work: learn a concept from a few pictures and draw it, on any computer.",
    "train": "Learn a concept from a few pictures.",
    "generate": "Draw pictures of prompts that name concepts.",
    "inspect": "Check a concept file and say what is in it.",
    "info": "Say what a model is, what memory it takes, and what will work.",
    "convert": "Turn a concept into files for other programs, or another implementation's checkpoint into a concept.",
    "studio": "Open the page: teach, draw, compare and combine in a browser, over a server.",
    "push": "Upload a concept and its card to the Hugging Face hub.",
    "export": "Write a model as a folder that runs without torch.",
    "serve": "Serve pictures to many users over HTTP.",
    "keys": "Make, list or revoke keys of a server.",
    "covariance": "Compute, find or copy the covariance of a model's text encoder.",
    "warmup": "Compile and tune the GPU kernels for a model, before the first picture.",
    "doctor": "Say what this installation can do, and why not more.",
}

UNEXPECTED, BAD_INPUT, REFUSED, INTERRUPTED = 1, 2, 3, 130
REFUSALS = {"ConceptFileError", "ConversionError", "CovarianceError", "ExportError", "ExportedFolderError", "UnsupportedPipeline"}


class Commands(TyperGroup):
    """Commands that are imported when they are called, and errors in one line."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)  # the entry that stands in for it in --help
        return name, _command(name), rest

    def invoke(self, ctx: typer.Context) -> Any:
        if ctx.params["debug"]:
            return super().invoke(ctx)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            number = getattr(error, "number", None)  # of a signal other than Ctrl-C's
            print("interrupted" if number is None else str(error), file=sys.stderr)
            raise typer.Exit(INTERRUPTED if number is None else 128 + number) from None
        except Exception as error:
            if isinstance(error, (typer.Abort, BrokenPipeError)) or hasattr(error, "exit_code"):
                raise  # Typer knows what to do
            code, message = _explain(error)
            print(f"error: {message}", file=sys.stderr)
            raise typer.Exit(code) from None


def _command(name: str) -> Any:
    function = getattr(importlib.import_module(f"perfusion.cli.{name}"), name)
    paragraphs = getdoc(function).split("\n\n")
    single = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
    single.command(name, help="\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))(_at_home(function))
    return typer.main.get_command(single)


def _at_home(function: Callable[..., None]) -> Callable[..., None]:
    """The command, with ~ in its paths expanded: shells do it in `--output ~/x`, and not in `--output=~/x` or behind NAME=."""

    @functools.wraps(function)
    def command(**options: Any) -> None:
        function(**{name: user_path(value) if isinstance(value, Path) else value for name, value in options.items()})

    return command


def _explain(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error that came out of a command."""
    from perfusion.errors import for_command_line
    from perfusion.writable import file_for_folder

    text = " ".join(for_command_line(error).split())
    if isinstance(error, OSError) and error.filename is not None:
        needs_folder = isinstance(error, (FileExistsError, NotADirectoryError))
        text = (needs_folder and file_for_folder(Path(error.filename))) or f"{error.filename}: {error.strerror}"
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        text += ". Check the path."
    kinds = {kind.__name__ for kind in type(error).__mro__}  # by name: an export draws where there is no torch to import
    if kinds & REFUSALS:
        return REFUSED, text
    if isinstance(error, (ValueError, OSError)) or "BackendUnavailable" in kinds:
        return BAD_INPUT, text
    return UNEXPECTED, f"{type(error).__name__}: {text} (unexpected; `perfusion --debug ...` shows where)"


app = typer.Typer(cls=Commands, rich_markup_mode=None, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        from perfusion import __version__

        print(f"perfusion {__version__}")
        raise typer.Exit


@app.callback()
def perfusion(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar="PERFUSION_DEBUG", help="Show where an error came from.")] = False,
) -> None:
    """Teach a text-to-image model a new word from a few pictures, in a file of some 30 KB (Perfusion, arXiv 2305.01644).

    Exit codes: 0 done, 1 something unexpected, 2 bad input, 3 a file or model that is refused, 4 no GPU where one
    is needed, 130 interrupted.
    """


def _stand_in() -> None:
    """Never called: `Commands.resolve_command` puts the real one in its place."""


for _name, _line in COMMANDS.items():
    app.command(_name, short_help=_line)(_stand_in)  # a help would be cut short


def _forgiving_console() -> None:
    """A picture named in Chinese on a console that knows no Chinese is told of with escapes; the work is done by then."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    _forgiving_console()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # models load from disk, in a moment
    set_threads(os.environ, core_limit())  # OpenMP reads them when torch is loaded
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its remarks on torchvision and long captions are nothing to act on
    app()
