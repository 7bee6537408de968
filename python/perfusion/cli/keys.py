"""`perfusion keys`: who may use a server."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Optional

import typer

from perfusion.cli.serve import data_folder, require
from perfusion.cli.strict_json import strict_json


def keys(
    name: Annotated[Optional[str], typer.Argument(metavar="[NAME]", help="Whose key; also the namespace of their concepts.")] = None,
    scope: Annotated[Optional[list[str]], typer.Option(help="draw, upload, train, admin. May be repeated. [default: draw]")] = None,
    concepts: Annotated[Optional[int], typer.Option(min=0, help="How many concepts they may have.", show_default=False)] = None,
    revoke: Annotated[bool, typer.Option("--revoke", help="Revoke the key of that name.")] = False,
    folder: Annotated[
        Optional[Path], typer.Option(help="The server's, as in `perfusion serve`. [default: in your data folder]", show_default=False)
    ] = None,
    database: Annotated[Optional[str], typer.Option(metavar="URL", help="The server's, as in `perfusion serve`.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make, list or revoke keys of a server, which may be running.

    With NAME a key is made and printed, this once: only its digest is kept. Without, the keys are listed. As soon as there is one, a
    server asks for it, also on this computer's own address.

    Exit codes: 0 done, 2 bad input.
    """
    require()
    from perfusion.serve.keys import Keys
    from perfusion.serve.settings import Settings
    from perfusion.serve.state import open_database

    known = Keys(open_database(Settings(folder=folder or data_folder(), database=database).database_url))
    if name is None:
        if revoke:
            raise ValueError("--revoke needs the NAME of the key to revoke.")
        found = known.list()
        if json:
            print(strict_json({"keys": found}))
        for each in () if json else found:
            created = datetime.datetime.fromtimestamp(each["created"], datetime.timezone.utc).strftime("%Y-%m-%d")
            print(f"{each['name']:<32}  {','.join(each['scopes']):<24}  {created}")
    elif revoke:
        if not known.revoke(name):
            raise ValueError(f"there is no key named {name!r}.")
        print(strict_json({"revoked": name}) if json else f"revoked {name}")
    else:
        key = known.add(name, scope or ["draw"], concepts)
        print(strict_json({"name": name, "key": key}) if json else key)
