"""What the tabs share: the client, the key of who sits before the page, lists that follow the server, and errors as sentences."""

from __future__ import annotations

import dataclasses
import functools
import html
import inspect
import io
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from perfusion.studio.answers import Answers
from perfusion.studio.client import Client, ServerError, sentence

__all__ = [
    "BUTTONS", "Running", "Shared", "decode", "guarded", "kept", "none_yet", "plain", "said", "seed_box", "seed_of", "settings_of",
    "shown_gallery", "shown_picture",
]  # fmt: skip

BUTTONS = ["download", "fullscreen"]  # of pictures; not Gradio's own "share", which uploads
SHOWN: dict[str, Any] = dict(buttons=BUTTONS, format="png", interactive=False)
NO_CONCEPTS = "No concepts yet. Train one, or upload a file under Concepts."


@dataclasses.dataclass(frozen=True)
class Following:
    """A list that follows the server. place: which entry it shows at first. uploads: it turns to what was uploaded."""

    shown: gr.Dropdown
    about: str  # "concepts", "bases" or "jobs"
    place: int = 0
    uploads: bool = False


@dataclasses.dataclass
class Shared:
    """Components and helpers of one page.

    suited: a list of base models, a setting, and the slider of it, which shows what suits the model until it is moved.
    """

    client: Client
    key: gr.Textbox
    drawn: gr.State  # [(picture, caption, prompt)], the newest first, of this visit
    answers: gr.State
    lists: list[Following] = dataclasses.field(default_factory=list)
    suited: list[tuple[gr.Dropdown, str, gr.Slider]] = dataclasses.field(default_factory=list)

    def concept_list(self, label: str, place: int = 0, uploads: bool = False, **options: Any) -> gr.Dropdown:
        return self._following("concepts", label, place, uploads, **options)

    def base_list(self) -> gr.Dropdown:
        return self._following("bases", "Model")

    def job_list(self) -> gr.Dropdown:
        return self._following("jobs", "Jobs", elem_id="jobs")

    def _following(self, about: str, label: str, place: int = 0, uploads: bool = False, **options: Any) -> gr.Dropdown:
        shown = gr.Dropdown([], label=label, interactive=True, filterable=False, **options)
        self.lists.append(Following(shown, about, place, uploads))
        return shown

    def steps_slider(self, model: gr.Dropdown) -> gr.Slider:
        return self._suited(model, "steps", gr.Slider(1, 150, 30, step=1, label="Steps"))

    def guidance_slider(self, model: gr.Dropdown) -> gr.Slider:
        return self._suited(model, "guidance_scale", gr.Slider(0, 30, 6, step=0.5, label="Guidance", elem_id="guidance"))

    def _suited(self, model: gr.Dropdown, field: str, slider: gr.Slider) -> gr.Slider:
        self.suited.append((model, field, slider))
        model.input(lambda answers, name: _suits(answers, name, field), [self.answers, model], slider, show_progress="hidden")
        return slider

    def ask(self, key: str, answers: Answers) -> None:
        """Ask the server which concepts and base models there are."""
        client = self.client.with_key(key)
        answers.ask("concepts", client.concepts)
        answers.ask("bases", client.bases)

    def follow(self, event: Any) -> None:
        """After the event the lists show what `answers` has then, each what it showed before if that is still there."""
        shown = [each.shown for each in self.lists]
        event.then(
            self._followed, [self.answers, *shown], [*shown, *(slider for *_, slider in self.suited)], show_progress="hidden",
            preprocess=False,  # else Gradio refuses what a list shows where its choices have just changed
        )  # fmt: skip

    def _followed(self, answers: Answers, *values: str | None) -> list[Any]:
        updates, turned, before = [], {}, None
        uploaded, answers.uploaded = answers.uploaded, None
        for each, value in zip(self.lists, values):
            choices = answers.choices(each.about)
            if choices is None:
                updates.append(gr.skip())
                continue
            there = [choice for _, choice in choices]
            wanted = uploaded if each.uploads and uploaded in there else value
            if wanted not in there:  # the second of two lists has another than the first, or nothing
                wanted = next((choice for choice in there if not each.place or choice != before), None)
            before = wanted
            if wanted == value:  # not sent: the visitor may have turned to another since
                updates.append(gr.Dropdown(choices=choices))
            else:
                updates.append(gr.Dropdown(choices=choices, value=wanted))
                turned[each.shown] = wanted
        return updates + [_suits(answers, turned[model], field) if model in turned else gr.skip() for model, field, _ in self.suited]


def _suits(answers: Answers, name: str | None, field: str) -> Any:
    """The slider at what the server says of a base model."""
    value = next((base.get(field) for base in answers.of("bases") or [] if base["id"] == name), None)
    return gr.skip() if value is None else gr.Slider(value=value)


def shown_gallery(label: str, columns: int = 4, **options: Any) -> gr.Gallery:
    """Pictures to look at and to take away."""
    return gr.Gallery(label=label, columns=columns, height="auto", fit_columns=False, **SHOWN, **options)


def shown_picture(label: str, elem_id: str) -> gr.Image:
    """One picture, likewise."""
    return gr.Image(label=label, elem_id=elem_id, type="pil", **SHOWN)


class Running:
    """What one visitor has under way; `end` breaks the connection to the server, which then stops drawing."""

    def __init__(self) -> None:
        self._close: Callable[[], None] | None = None

    def opened(self, close: Callable[[], None]) -> None:
        self._close = close

    def end(self) -> str:
        if self._close is not None:
            self._close()
        return said("Stopped.")


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The handler, whose errors stay on the page as a sentence until they are closed."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*arguments: Any) -> Iterator[Any]:
            try:
                yield from function(*arguments)
            except (ServerError, ValueError, OSError) as error:
                raise _shown(error) from None

        return generator

    @functools.wraps(function)
    def handler(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ServerError, ValueError, OSError) as error:
            raise _shown(error) from None

    return handler


def _shown(error: Exception) -> gr.Error:
    text = f"{Path(error.filename).name}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    return gr.Error(plain(sentence(text)), duration=None, title="This did not work", print_exception=False)


def plain(text: str) -> str:
    """Text for a place where Gradio reads HTML: prompts, and what servers say, are shown as they are."""
    return html.escape(text, quote=False)


def said(text: str) -> str:
    """A line of state, which screen readers are told of."""
    return f'<p role="status" aria-live="polite">{plain(text)}</p>'


def none_yet(name: str | None) -> str:
    """The chosen concept; ValueError where there is none."""
    if not name:
        raise ValueError(NO_CONCEPTS)
    return name


def settings_of(steps: float, guidance: float | None = None, negative: str = "", model: str | None = None) -> dict[str, Any]:
    """Fields of a request that every tab has. Without a guidance the server takes what suits the model."""
    fields: dict[str, Any] = {"steps": int(steps)}
    if guidance is not None:
        fields["guidance_scale"] = float(guidance)
    if negative.strip():
        fields["negative_prompt"] = negative.strip()
    if model:
        fields["model"] = model
    return fields


def seed_box(value: str = "") -> gr.Textbox:
    return gr.Textbox(value, label="Seed", info="Empty: another one each time", lines=1, max_lines=1)


def seed_of(text: str) -> int:
    """The number that was typed; one at random for nothing."""
    text = text.strip()
    if not text:
        return random.randrange(2**31)
    if not (text.isascii() and text.isdecimal() and int(text) < 2**63):
        raise ValueError(f"a seed is a whole number from 0 on, got {text!r}")
    return int(text)


def decode(data: bytes) -> Image.Image:
    """A picture from the server."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def kept(name: str, data: bytes) -> str:
    """A file that the browser may fetch, in a folder of its own; the system's folder for temporary files is Gradio's to serve."""
    file = Path(tempfile.mkdtemp(prefix="perfusion-studio-")) / name
    file.write_bytes(data)
    return str(file)
