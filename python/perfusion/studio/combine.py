"""The tab Combine: two concepts in one picture, each in a region that is painted or chosen."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from perfusion.studio.painting import BOXES, COLOURS, box_mask, png, region_masks, tinted
from perfusion.studio.shared import Running, Shared, decode, guarded, none_yet, said, seed_box, seed_of, settings_of, shown_picture

__all__ = ["build"]

CANVAS = 384


def build(shared: Shared) -> None:
    with gr.Row():
        with gr.Column(min_width=280):
            with gr.Row():
                first, second = shared.concept_list("First concept (orange)"), shared.concept_list("Second concept (blue)", place=1)
            with gr.Row():
                strengths = [gr.Slider(0, 2, 0.9, step=0.05, label=f"Strength of the {which}") for which in ("first", "second")]
            prompt = gr.Textbox("a <{1}> next to a <{2}>", label="Prompt", info="{1} and {2} stand for the concepts' names.", lines=1)
            layout = gr.Radio([*BOXES, "painted", "everywhere"], value="left and right", label="Regions")
            with gr.Row():
                seed, model = seed_box(), shared.base_list()
            steps = shared.steps_slider(model)
            with gr.Row():
                go, stop = gr.Button("Draw both", variant="primary", elem_id="draw-both"), gr.Button("Stop")
        with gr.Column(min_width=280):
            canvas = gr.ImageEditor(
                Image.new("RGB", (CANVAS, CANVAS), "white"), label="Paint the regions", type="pil", image_mode="RGBA", sources=(),
                transforms=(), brush=gr.Brush(default_size=60, colors=list(COLOURS), color_mode="fixed"), layers=False,
                visible=False, elem_id="regions", canvas_size=(CANVAS, CANVAS), fixed_canvas=True, height=CANVAS + 120,
            )  # fmt: skip
            picture = shown_picture("Picture", "both")
            shown = shown_picture("Regions over it", "shown-regions")
            status = gr.HTML(elem_classes="status", elem_id="both-status")

    state = gr.State(Running())

    @guarded
    def draw(key: str, state: Running, first: str, second: str, one: float, two: float, text: str, layout: str, painting: Any, seed: str,
             model: str, steps: float) -> Iterator[Any]:  # fmt: skip
        names = none_yet(first), none_yet(second)
        if first == second:
            raise ValueError("choose two different concepts")
        text = text.replace("{1}", first).replace("{2}", second)
        for name in names:
            if f"<{name}" not in text:
                raise ValueError(f"the prompt has to name both concepts, and <{name}> is not in it")
        uses: list[dict[str, Any]] = [{"name": name, "strength": strength} for name, strength in zip(names, (one, two))]
        masks: list[Image.Image | None] = [None, None]
        if layout in BOXES:
            masks = [box_mask(box, (CANVAS, CANVAS)) for box in BOXES[layout]]
            for use, box in zip(uses, BOXES[layout]):
                use["region"] = {"box": list(box)}
        elif layout == "painted":
            masks = region_masks(painting, (CANVAS, CANVAS))
            for use, mask, colour in zip(uses, masks, ("orange", "blue")):
                if mask is None:
                    raise ValueError(f"paint where <{use['name']}> is to be, in {colour}, or choose other regions")
                use["region"] = {"mask": base64.b64encode(png(mask)).decode()}
        number = seed_of(seed)
        request = {"prompt": text, "seed": number, "concepts": uses, **settings_of(steps, model=model)}
        yield gr.skip(), None, said("Waiting for its turn …")
        for event in shared.client.with_key(key).watch_drawing(request, opened=state.opened):
            image = decode(event.picture)
            if event.kind == "image_generation.completed":
                yield image, tinted(image, masks) if any(masks) else None, said(f"Seed {event.data.get('seed', number)}, “{text}”")
            else:
                yield image, None, said(f"Step {event.data['step']} of {event.data['steps']}")

    inputs = [shared.key, state, first, second, *strengths, prompt, layout, canvas, seed, model, steps]
    running = go.click(draw, inputs, [picture, shown, status], show_progress="hidden", trigger_mode="always_last")
    stop.click(Running.end, state, status, cancels=[running])
    layout.change(lambda layout: gr.ImageEditor(visible=layout == "painted"), layout, canvas, show_progress="hidden")
