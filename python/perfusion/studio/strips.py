"""The tab Strips: one prompt and one seed over strength, over the gate's bias β, or over both."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gradio as gr

from perfusion.contact_sheet import sheet
from perfusion.studio.painting import png
from perfusion.studio.shared import Shared, decode, guarded, kept, none_yet, said, seed_box, seed_of, settings_of, shown_picture

__all__ = ["build"]

AXES = {"strength": ("strength",), "β": ("beta",), "both": ("strength", "beta")}
AT_ONCE = 8  # requests; the server draws them in one batch


def build(shared: Shared) -> None:
    gr.Markdown("The same prompt and seed, with the concept turned up step by step.")
    with gr.Row():
        with gr.Column(min_width=280):
            concept = shared.concept_list("Concept")
            prompt = gr.Textbox("a photo of a <{}>", label="Prompt", info="{} stands for the concept's name.", lines=1)
            axis = gr.Radio(list(AXES), value="strength", label="Over")
        with gr.Column(min_width=280):
            with gr.Row():
                low, high = gr.Number(0, label="Strength from", minimum=0), gr.Number(1.5, label="to", minimum=0)
            with gr.Row():
                beta_low, beta_high = gr.Number(0.5, label="β from"), gr.Number(0.9, label="to")
            count = gr.Slider(2, 8, 5, step=1, label="Pictures along each", elem_id="along")
            with gr.Row():
                seed, model = seed_box("0"), shared.base_list()
            steps = shared.steps_slider(model)
    with gr.Row():
        go, stop = gr.Button("Draw the strip", variant="primary", elem_id="draw-strip"), gr.Button("Stop")
    status = gr.HTML(elem_classes="status", elem_id="strip-status")
    strip = shown_picture("Strip", "strip")
    save = gr.DownloadButton("Download the strip", interactive=False, size="sm")

    @guarded
    def draw(key: str, name: str, text: str, axis: str, low: float, high: float, beta_low: float, beta_high: float, count: float,
             seed: str, model: str, steps: float) -> Iterator[Any]:  # fmt: skip
        client, fields, count = shared.client.with_key(key), AXES[axis], int(count)
        text = text.replace("{}", none_yet(name))
        if f"<{name}" not in text:
            raise ValueError(f"the prompt has to name the concept: write {{}} or <{name}> in it")
        ranges = {"strength": (low, high), "beta": (beta_low, beta_high)}
        if any(value is None for field in fields for value in ranges[field]):
            raise ValueError("give both ends of what the strip goes over")
        values = [
            [round(start + (end - start) * place / (count - 1), 3) for place in range(count)] for start, end in map(ranges.get, fields)
        ]
        number = seed_of(seed)
        points = list(itertools.product(*reversed(values)))  # with both: β downwards, strength to the right
        common = {"prompt": text, "seed": number, **settings_of(steps, model=model)}
        requests = [{**common, **dict(zip(reversed(fields), point))} for point in points]
        titles = [", ".join(f"{field} {value:g}" for field, value in zip(reversed(fields), point)) for point in points]
        yield None, said(f"0 of {len(points)} …"), gr.DownloadButton(interactive=False)
        images = []
        with ThreadPoolExecutor(AT_ONCE) as pool:
            waiting = [pool.submit(client.draw, request) for request in requests]
            try:
                for each in waiting:
                    images.append(decode(each.result()[0][0]))
                    yield gr.skip(), said(f"{len(images)} of {len(points)} …"), gr.skip()
            finally:
                for each in waiting:
                    each.cancel()
        page = sheet(images, columns=count, titles=titles)
        file = kept(f"{name}-{axis.replace('β', 'beta')}.png", png(page))
        yield page, said(f"Seed {number}, “{text}”"), gr.DownloadButton(value=file, interactive=True)

    inputs = [shared.key, concept, prompt, axis, low, high, beta_low, beta_high, count, seed, model, steps]
    running = go.click(draw, inputs, [strip, status, save], show_progress="hidden", trigger_mode="always_last")
    stop.click(lambda: said("Stopped."), None, status, cancels=[running])
