"""`perfusion push`: a concept to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from perfusion.cli.strict_json import strict_json


def push(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="The folder that training wrote, or a concept file.", show_default=False)
    ],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="Where to put it.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is new.")] = False,
    references: Annotated[bool, typer.Option("--references", help="Upload the pictures it was learned from, too.")] = False,
    message: Annotated[Optional[str], typer.Option(help="The commit's message.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Upload a concept, its card and its gallery to the Hugging Face hub.

    The pictures that it was learned from are kept back unless --references is given, and so are config.yaml and the log, which
    name files of this computer. Log in with `hf auth login` first. What is there can then be drawn by anybody:
    perfusion generate "a <name>" --concept USER/NAME.

    Exit codes: 0 done, 2 bad input, 3 a concept that is refused.
    """
    from perfusion import hub

    address = hub.push(source, repository, private=private, references=references, message=message)
    print(strict_json({"address": address, "repository": repository}) if json else f"Pushed to {address}")
