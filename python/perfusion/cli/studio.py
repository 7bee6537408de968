"""`perfusion studio`: the page."""

from __future__ import annotations

from typing import Annotated, Optional

import typer


def studio(
    server: Annotated[str, typer.Option(metavar="ADDRESS", help="The server it speaks to.")] = "http://127.0.0.1:8000",
    key: Annotated[
        Optional[str],
        typer.Option(
            envvar="PERFUSION_KEY", help="The key it acts with. Without one, who opens the page types theirs.", show_default=False
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Where the page listens; 0.0.0.0 for every address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The page's port.")] = 7860,
    open: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Open the page: teach concepts, paint masks, draw, compare and combine, in a browser.

    It speaks to a running `perfusion serve` and has no model of its own. It needs Gradio: pip install 'perfusion-kernels[ui]'.
    It asks nothing of the internet.

    Who reaches the page acts with --key: with another --host than this computer's own, leave it out.

    Exit codes: 0 done, 2 bad input.
    """
    from perfusion.studio import Client, ServerError

    client = Client(server, key)
    try:
        from perfusion.studio import launch
    except ImportError as error:
        raise ValueError(f"the page needs Gradio 6 ({error}): pip install 'perfusion-kernels[ui]'") from None
    try:
        client.bases()
    except ServerError as error:
        if error.status is None:
            raise ValueError(str(error)) from None  # a key can still be typed, a server cannot
    launch(client, host=host, port=port, open=open)
