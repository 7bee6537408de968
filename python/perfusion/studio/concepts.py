"""The tab Concepts: what there is, where it came from, and its file and card to take away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from perfusion.studio.answers import Answers
from perfusion.studio.card import archive, card
from perfusion.studio.shared import Shared, guarded, kept, none_yet, plain, shown_gallery

__all__ = ["build"]


def build(shared: Shared, tab: gr.Tab) -> list[Any]:
    """The events after which there are other concepts."""
    with gr.Row():
        with gr.Column(min_width=280):
            concept = shared.concept_list("Concept", uploads=True, elem_id="concept")
            facts = gr.Markdown(elem_id="facts")
            pictures = shown_gallery("Drawn with it in this visit")
        with gr.Column(min_width=280):
            upload = gr.File(label="Upload a concept (.safetensors)", file_types=[".safetensors"], type="filepath", elem_id="upload")
            gr.Markdown("#### Take it away")
            with gr.Row():
                file = gr.DownloadButton("File", elem_id="file", interactive=False)
                whole = gr.DownloadButton("File, card and pictures", elem_id="archive", interactive=False)
            text = gr.Code(label="Its card", language="markdown", interactive=False, lines=8, max_lines=16, wrap_lines=True)
            gr.Markdown("To share it on the Hugging Face hub, unpack the archive and run `perfusion push FOLDER USER/NAME`.")
            with gr.Row():
                sure = gr.Checkbox(label="I want to delete it", elem_id="sure")
                delete = gr.Button("Delete", variant="stop", elem_id="delete")

    @guarded
    def show(key: str, drawn: list, name: str | None) -> tuple[Any, ...]:
        off = gr.DownloadButton(interactive=False)
        if not name:
            return "No concept is chosen.", [], off, off, ""
        client = shared.client.with_key(key)
        found = client.concept(name)
        data = client.concept_file(name)
        mine = [(image, caption) for image, caption in drawn if f"<{name}>" in caption or f"<{name}:" in caption]
        files = (
            kept(f"{name}.safetensors", data),
            kept(f"{name}.zip", archive(found, data, [image for image, _ in mine])),
        )
        buttons = [gr.DownloadButton(value=file, interactive=True) for file in files]
        return _facts(found), mine, *buttons, card(found, with_gallery=bool(mine))

    @guarded
    def add(key: str, answers: Answers, path: str | None) -> None:
        """Empties the place for files, too."""
        if path is not None:
            client = shared.client.with_key(key)
            name = client.upload(Path(path))["name"]
            answers.ask("concepts", client.concepts)
            answers.uploaded = name
            gr.Info(plain(f"<{name}> is there now."))

    @guarded
    def remove(key: str, answers: Answers, name: str | None, sure: bool) -> bool:
        if not sure:
            raise ValueError("tick “I want to delete it” first; nothing was deleted")
        client = shared.client.with_key(key)
        client.delete(none_yet(name))
        answers.ask("concepts", client.concepts)
        gr.Info(plain(f"<{name}> is gone."))
        return False

    gr.on(
        [concept.change, tab.select], show, [shared.key, shared.drawn, concept], [facts, pictures, file, whole, text],
        show_progress="hidden", trigger_mode="always_last", preprocess=False,
    )  # fmt: skip
    added = upload.upload(add, [shared.key, shared.answers, upload], upload, show_progress="hidden")
    removed = delete.click(remove, [shared.key, shared.answers, concept, sure], sure, show_progress="hidden")
    return [added, removed]


def _facts(concept: dict[str, Any]) -> str:
    labels = {
        "superclass": "Superclass",
        "models": "Models",
        "beta": "β",
        "tau": "τ",
        "bytes": "Bytes",
        "author": "Author",
        "license": "Licence",
    }
    lines = [f"### <{concept['name']}>".replace("<", "&lt;"), "", "| | |", "|---|---|"]
    for key, label in labels.items():
        value = concept.get(key)
        if value not in (None, "", []):
            value = ", ".join(map(str, value)) if isinstance(value, list) else f"{value:,}" if key == "bytes" else value
            text = str(value).replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| {label} | {text} |")
    return "\n".join(lines)
