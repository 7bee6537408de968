"""`create_page`: the tabs together; `launch`: the page served. Nothing here asks anything of the internet."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr  # noqa: E402

from perfusion.studio import combine, concepts, draw, strips, train  # noqa: E402
from perfusion.studio.answers import Answers  # noqa: E402
from perfusion.studio.client import Client, ServerError  # noqa: E402
from perfusion.studio.shared import Shared, guarded  # noqa: E402

__all__ = ["create_page", "launch"]

STYLE = (Path(__file__).parents[1] / "templates" / "studio.css").read_text(encoding="utf-8")
UPLOAD = "32mb"  # of one file, as the server's own limit


def _theme() -> gr.themes.Base:
    """Fonts of the computer, none that is fetched."""
    fonts = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gr.themes.Default(primary_hue="orange", neutral_hue="stone", **fonts)


def create_page(client: Client) -> gr.Blocks:
    """The page over a server. Without a key of the client's own, each visitor types theirs."""
    with gr.Blocks(title="perfusion studio", analytics_enabled=False) as page:
        gr.Markdown("# perfusion studio", elem_id="title")
        with gr.Accordion("Connection", open=False, elem_id="connection"):
            where = gr.Markdown()
            key = gr.Textbox(
                "", label="Key", type="password", info="Only where the server asks for one. It is kept in this page alone.", lines=1
            )
            again = gr.Button("Connect", size="sm")
        answers = gr.State(Answers())
        shared = Shared(client, key, gr.State([]), answers)
        with gr.Tabs():
            with gr.Tab("Draw", id="draw"):
                draw.build(shared)
            with gr.Tab("Train", id="train"):
                learned = train.build(shared)
            with gr.Tab("Concepts", id="concepts") as tab:
                changed = concepts.build(shared, tab)
            with gr.Tab("Strips", id="strips"):
                strips.build(shared)
            with gr.Tab("Combine", id="combine"):
                combine.build(shared)

        def connect(key: str, answers: Answers) -> str:
            try:
                shared.ask(key, answers)
            except ServerError as error:
                return f"{client.server}: {error}"
            with contextlib.suppress(ServerError):  # a key that may not train
                answers.ask("jobs", client.with_key(key).jobs)
            return f"{client.server} answers."

        connected = gr.on([page.load, again.click, key.submit], connect, [key, answers], where, show_progress="hidden")
        asked = (event.then(guarded(shared.ask), [key, answers], show_progress="hidden") for event in learned)
        for event in (connected, *asked, *changed):
            shared.follow(event)
    return page


def launch(client: Client, *, host: str = "127.0.0.1", port: int = 7860, open: bool = False, block: bool = True) -> gr.Blocks:
    """Serve the page until it is interrupted, or, with block=False, until `close` is called on what comes back.

    OSError where the port is taken.
    """
    for name in ("NO_PROXY", "no_proxy"):  # Gradio asks its own address whether it is there, which no proxy is to answer
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "localhost", "127.0.0.1", host)))
    page = create_page(client)
    page.queue(default_concurrency_limit=16, api_open=False)
    page.launch(
        server_name=host, server_port=port, inbrowser=open, share=False, quiet=True, prevent_thread_lock=True, theme=_theme(), css=STYLE,
        footer_links=[], ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, max_file_size=UPLOAD,
        _frontend=False,  # else Gradio refuses to start where the page is not answered within three seconds
    )  # fmt: skip
    print(f"perfusion studio: http://{host}:{port}, over {client.server}", flush=True)
    if block:
        page.block_thread()
    return page
