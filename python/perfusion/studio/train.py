"""The tab Train: pictures, masks that are painted or looked over, and a training job that is watched."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from perfusion.pictures import open_picture
from perfusion.studio.answers import Answers
from perfusion.studio.client import Client
from perfusion.studio.painting import overlay, painted_mask, png
from perfusion.studio.shared import BUTTONS, Shared, decode, guarded, seed_box, seed_of, shown_gallery, shown_picture
from perfusion.training_config import TrainingConfig

__all__ = ["build"]

MOST, CANVAS = 32, 384
ABOUT_MASKS = """What is white in a mask is learned, the rest is not. Choose a picture above, paint over the thing and keep the mask; or
upload masks that are named as their pictures: `a.png` or `a-masklabel.png` for `a.jpg`."""
DONE = {"succeeded": "is learned", "failed": "could not be learned", "cancelled": "is cancelled; its checkpoint is kept"}


def build(shared: Shared) -> list[Any]:
    """The events after which there may be a new concept."""
    masks = gr.State({})  # path of a picture -> its mask, [L], in the picture's size
    chosen = gr.State("")
    with gr.Row():
        with gr.Column(min_width=280):
            pictures = gr.Gallery(
                label="Pictures of one thing, 4 to 10", type="filepath", columns=4, height="auto", fit_columns=False, buttons=BUTTONS,
                sources=["upload"], interactive=True, file_types=["image"], elem_id="pictures", allow_preview=False,
            )  # fmt: skip
            with gr.Row():
                name = gr.Textbox("", label="Name", placeholder="mycat", info="Prompts write it <mycat>.", lines=1)
                superclass = gr.Textbox("", label="It is a", placeholder="cat", info="One everyday word", lines=1)
            with gr.Accordion("Masks", open=False, elem_id="masks"):
                gr.Markdown(ABOUT_MASKS)
                editor = gr.ImageEditor(
                    label="Paint over the thing", elem_id="mask-editor", type="pil", image_mode="RGBA", sources=(), transforms=(),
                    layers=False, brush=gr.Brush(default_size=30, colors=["#d9480f"], color_mode="fixed"), canvas_size=(CANVAS, CANVAS),
                    height=CANVAS + 120,
                )  # fmt: skip
                with gr.Row():
                    keep = gr.Button("Keep this mask", elem_id="keep-mask")
                    clear = gr.Button("No masks", elem_id="clear-masks")
                files = gr.File(
                    label="Upload masks", elem_id="mask-files", file_count="multiple", file_types=["image"], type="filepath", height=120
                )
            checked = shown_gallery("What is learned", elem_id="checked")
        with gr.Column(min_width=280):
            with gr.Row():
                steps = gr.Slider(10, 5000, TrainingConfig.steps, step=10, label="Steps", elem_id="steps")
                often = TrainingConfig.validation_every
                every = gr.Slider(0, 500, often, step=10, label="Preview every", info="Steps; 0 for none", elem_id="every")
            with gr.Accordion("More", open=False):
                model = shared.base_list()
                batch = gr.Slider(1, 32, TrainingConfig.batch_size, step=1, label="Pictures a step")
                seed = seed_box("0")
                flip = gr.Checkbox(False, label="Mirror pictures at random")
                author, licence = gr.Textbox("", label="Author", lines=1), gr.Textbox("", label="Licence", lines=1)
            go = gr.Button("Train", variant="primary", elem_id="train")
            job = shared.job_list()
            with gr.Row():
                watch, resume, cancel = (gr.Button(text, size="sm", min_width=70) for text in ("Watch", "Go on", "Cancel the job"))
            progress = gr.HTML(elem_id="progress")
            preview = shown_picture("Preview", "preview")

    @guarded
    def choose(items: list | None, masks: dict, event: gr.SelectData) -> tuple[Any, str]:
        path = _paths(items)[event.index]
        image = _fitted(open_picture(Path(path)).convert("RGB"))
        return {"background": image, "layers": [], "composite": image}, path

    @guarded
    def keep_mask(items: list | None, masks: dict, chosen: str, painting: Any) -> tuple[dict, list]:
        if chosen not in _paths(items):
            raise ValueError("choose one of the pictures first, then paint over the thing in it")
        size = _fitted(open_picture(Path(chosen))).size
        mask = painted_mask(painting, _canvas_of(painting, size))
        if mask is None:
            raise ValueError("nothing is painted; paint over what is to be learned")
        masks = {**masks, chosen: mask}
        return masks, _checked(items, masks)

    @guarded
    def add_masks(items: list | None, masks: dict, files: list[str] | None) -> tuple[dict, list, None]:
        from perfusion.masks import masked_stem

        named = {Path(path).stem.lower(): path for path in _paths(items)}
        masks = dict(masks)
        for file in files or []:
            stem = (masked_stem(file) or Path(file).stem).lower()
            if stem not in named:
                raise ValueError(f"no picture is named as the mask {Path(file).name}; there are {', '.join(sorted(named)) or 'none'}")
            mask = open_picture(Path(file)).convert("L")
            picture = open_picture(Path(named[stem]))
            if abs(mask.width * picture.height - mask.height * picture.width) > 0.02 * mask.width * picture.height:
                raise ValueError(f"the mask {Path(file).name} has another shape than its picture: {mask.size} and {picture.size}")
            if mask.getbbox() is None:
                raise ValueError(f"the mask {Path(file).name} is black everywhere, so nothing would be learned")
            masks[named[stem]] = mask
        return masks, _checked(items, masks), None

    @guarded
    def train(key: str, answers: Answers, items: list | None, masks: dict, name: str, superclass: str, steps: float, every: float,
              model: str, batch: float, seed: str, flip: bool, author: str, licence: str) -> Iterator[Any]:  # fmt: skip
        paths = _paths(items)
        if not paths:
            raise ValueError("upload pictures of the thing first")
        if len(paths) > MOST:
            raise ValueError(f"at most {MOST} pictures, got {len(paths)}")
        if not name.strip() or not superclass.strip():
            raise ValueError("give it a name, and an everyday word for what it is")
        sent = [(f"{number}-{Path(path).name}", Path(path).read_bytes()) for number, path in enumerate(paths)]
        whole = (
            {path: masks.get(path) or Image.new("L", open_picture(Path(path)).size, 255) for path in paths} if _any(masks, paths) else {}
        )
        fields = {"name": name.strip(), "superclass": superclass.strip(), "steps": int(steps), "preview_every": int(every)}
        fields |= {"seed": seed_of(seed), "batch_size": int(batch), "flip": TrainingConfig.flip if flip else 0.0}
        fields |= {field: value for field, value in (("model", model), ("author", author.strip()), ("license", licence.strip())) if value}
        client = shared.client.with_key(key)
        made = client.train(sent, [png(mask) for mask in whole.values()], **fields)
        yield _bar(made), None, _jobs(client, answers, made["id"])
        yield from _watched(client, answers, made["id"])

    @guarded
    def go_on(key: str, answers: Answers, id: str | None, resume: bool) -> Iterator[Any]:
        if not id:
            raise ValueError("there are no jobs yet")
        client = shared.client.with_key(key)
        if resume:
            client.job_action(id, "resume")
        yield from _watched(client, answers, id)

    @guarded
    def stop(key: str, answers: Answers, id: str | None) -> Any:
        if not id:
            raise ValueError("there are no jobs yet")
        client = shared.client.with_key(key)
        return _bar(client.job_action(id, "cancel")), _jobs(client, answers, id)

    pictures.change(guarded(_checked), [pictures, masks], checked, show_progress="hidden")
    pictures.select(choose, [pictures, masks], [editor, chosen], show_progress="hidden")
    keep.click(keep_mask, [pictures, masks, chosen, editor], [masks, checked], show_progress="hidden")
    clear.click(lambda items: ({}, _checked(items, {})), pictures, [masks, checked])
    files.upload(add_masks, [pictures, masks, files], [masks, checked, files], show_progress="hidden")
    seen = [progress, preview, job]
    inputs = [shared.key, shared.answers, pictures, masks, name, superclass, steps, every, model, batch, seed, flip, author, licence]
    options = {"show_progress": "hidden"}
    trained = go.click(train, inputs, seen, **options)
    which = [shared.key, shared.answers, job]
    watched = watch.click(lambda *inputs: (yield from go_on(*inputs, False)), which, seen, **options)
    resumed = resume.click(lambda *inputs: (yield from go_on(*inputs, True)), which, seen, **options)
    cancel.click(stop, which, [progress, job], **options)
    return [trained, watched, resumed]


def _paths(items: list | None) -> list[str]:
    return [item[0] if isinstance(item, (tuple, list)) else item for item in items or []]


def _any(masks: dict, paths: list[str]) -> bool:
    return any(path in masks for path in paths)


def _fitted(image: Image.Image) -> Image.Image:
    """No larger than the editor's canvas, so that a stroke falls where it is seen."""
    image = image.copy()
    image.thumbnail((CANVAS, CANVAS))
    return image


def _canvas_of(painting: Any, size: tuple[int, int]) -> tuple[int, int]:
    """The size of what was painted on; the editor may have made its layers larger than the picture that was put in."""
    background = (painting or {}).get("background")
    return background.size if background is not None else size


def _checked(items: list | None, masks: dict) -> list[tuple[Image.Image, str]]:
    """Each picture as training will see it, and whether it has a mask."""
    paths = _paths(items)
    return [(overlay(_fitted(open_picture(Path(path))), masks.get(path)), "its mask" if path in masks else "all of it") for path in paths]


def _jobs(client: Client, answers: Answers, shown: str) -> Any:
    """The list of jobs, asked for anew, at one of them."""
    answers.ask("jobs", client.jobs)
    return gr.Dropdown(choices=answers.choices("jobs"), value=shown)


def _bar(job: dict[str, Any]) -> str:
    """The state of a job: a bar, and the same in words, which screen readers are told of."""
    name, status, step, steps = html.escape(str(job.get("name", ""))), job.get("status", "running"), job.get("step", 0), job.get("steps", 1)
    words = f"Step {step} of {steps}"
    if status in DONE:
        words = f"&lt;{name}&gt; {DONE[status]}."
        if job.get("error"):
            words += " " + html.escape(str(job["error"]))
    elif status == "queued":
        words = f"&lt;{name}&gt; waits for its turn."
    if job.get("loss") is not None and status not in DONE:
        words += f", loss {job['loss']:.4f}"
    return f'<progress max="{steps}" value="{step}" aria-label="Training"></progress><p role="status" aria-live="polite">{words}</p>'


def _watched(client: Client, answers: Answers, id: str) -> Iterator[Any]:
    """Updates of the bar, the preview and the list until the job ends."""
    job = {"name": "", "status": "running"}
    for event in client.watch_job(id):
        if event.kind == "preview":
            yield gr.skip(), decode(event.picture), gr.skip()
        elif event.kind == "progress":
            job |= event.data
            yield _bar({**job, "status": "running"}), gr.skip(), gr.skip()
        elif event.kind in DONE:
            yield _bar({**event.data, "status": event.kind}), gr.skip(), _jobs(client, answers, id)
