"""The tab Draw: a prompt, its pictures as they come into being, and the gallery of this visit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from perfusion.studio.shared import (
    Running,
    Shared,
    decode,
    guarded,
    plain,
    said,
    seed_box,
    seed_of,
    settings_of,
    shown_gallery,
    shown_picture,
)  # fmt: skip

__all__ = ["build"]

KEPT = 200  # pictures of a visit


def build(shared: Shared) -> None:
    with gr.Row():
        with gr.Column(min_width=280):
            prompt = gr.Textbox(
                "", label="Prompt", placeholder="a photo of a <teddy> on a beach", info="A concept is written <name>.", lines=1
            )
            with gr.Row():
                concept = shared.concept_list("Concept", scale=2)
                insert = gr.Button("Put into the prompt", size="sm", scale=1)
            negative = gr.Textbox("", label="Not wanted", lines=1)
            strength = gr.Slider(0, 2, 1, step=0.05, label="Strength", info="How much of the concept")
            with gr.Column():
                own = gr.Checkbox(True, label="β of the concept's own")
                beta = gr.Slider(0, 1, 0.7, step=0.01, label="β", info="Lower shows more of it", visible=False, elem_id="beta")
            with gr.Accordion("More", open=False):
                model = shared.base_list()
                steps, guidance = shared.steps_slider(model), shared.guidance_slider(model)
                count = gr.Slider(1, 10, 1, step=1, label="Pictures", elem_id="count")
                seed = seed_box()
            with gr.Row():
                go = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop")
        with gr.Column(min_width=280):
            picture = shown_picture("Picture", "picture")
            status = gr.HTML(elem_id="draw-status", elem_classes="status")
    gallery = shown_gallery("Drawn in this visit", 6, elem_id="gallery")
    picked = gr.HTML(elem_classes="status")

    state = gr.State(Running())

    @guarded
    def draw(key: str, state: Running, drawn: list, text: str, negative: str, strength: float, own: bool, beta: float, model: str,
             steps: float, guidance: float, count: float, seed: str) -> Iterator[Any]:  # fmt: skip
        if not text.strip():
            raise ValueError("write a prompt first")
        client = shared.client.with_key(key)
        number = seed_of(seed)
        request = {"prompt": text.strip(), "seed": number, "strength": strength, **settings_of(steps, guidance, negative, model)}
        if not own:
            request["beta"] = beta
        yield gr.skip(), said("Waiting for its turn …"), gr.skip(), gr.skip()
        found = []
        if count == 1:
            for event in client.watch_drawing(request, opened=state.opened):
                if event.kind == "image_generation.partial_image":
                    yield decode(event.picture), said(f"Step {event.data['step']} of {event.data['steps']}"), gr.skip(), gr.skip()
                elif event.kind == "image_generation.completed":
                    found.append((decode(event.picture), event.data.get("seed", number)))
        else:
            found = [(decode(data), own_seed) for data, own_seed in client.draw({**request, "n": int(count)})]
        made = [(image, f"{text.strip()} (seed {own_seed})") for image, own_seed in found]
        drawn = [*made, *drawn][:KEPT]
        seeds = ", ".join(str(own_seed) for _, own_seed in found)
        yield found[0][0] if found else None, said(f"Seed {seeds}"), drawn, drawn

    inputs = [shared.key, state, shared.drawn, prompt, negative, strength, own, beta, model, steps, guidance, count, seed]
    # a click while a picture is drawn, or before its answer has ended, is kept and drawn next; "once" would drop it without a word
    running = gr.on(
        [go.click, prompt.submit], draw, inputs, [picture, status, gallery, shared.drawn], show_progress="hidden",
        trigger_mode="always_last",
    )  # fmt: skip
    stop.click(Running.end, state, status, cancels=[running])
    own.change(lambda own: gr.Slider(visible=not own), own, beta)
    insert.click(lambda text, name: f"{text.rstrip()} <{name}>".strip() if name else text, [prompt, concept], prompt)

    def pick(drawn: list, event: gr.SelectData) -> str:
        return plain(drawn[event.index][1]) if event.index < len(drawn) else ""

    gallery.select(pick, shared.drawn, picked)
