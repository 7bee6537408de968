"""What `perfusion generate` draws with: scheduler, size, pictures to start from, and the cells of a grid."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfusion.families import Family

if TYPE_CHECKING:
    from perfusion.handle import Handle

__all__ = ["SCHEDULERS", "Cell", "cells", "prepare"]

# name -> (diffusers' class, options)
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
_OF_CONCEPTS = ("strength", "bias", "temperature")
_OF_PICTURES = {"steps": int, "guidance_scale": float}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One column of a grid: steps, guidance, and (concept or None for all, setting, value); `title` says what differs.

    None is what suits the model, see `of`.
    """

    steps: int | None
    guidance_scale: float | None
    settings: tuple[tuple[str | None, str, float], ...] = ()
    title: str = ""

    def of(self, family: Family) -> Cell:
        """The same with what the family takes where nothing is said."""
        steps = family.steps if self.steps is None else self.steps
        guidance_scale = family.guidance_scale if self.guidance_scale is None else self.guidance_scale
        return dataclasses.replace(self, steps=steps, guidance_scale=guidance_scale)

    def facts(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The facts of a picture in this column."""
        concepts = {
            name: values | {key: value for which, key, value in self.settings if which in (None, name)}
            for name, values in facts["concepts"].items()
        }
        return facts | {"steps": self.steps, "guidance_scale": self.guidance_scale, "concepts": concepts}

    def check(self, handle: Handle) -> None:
        """ValueError for a concept that is not loaded, or a value out of its range; nothing stays changed."""
        with self.set(handle):
            pass

    @contextlib.contextmanager
    def set(self, handle: Handle) -> Iterator[None]:
        """Inside, the concepts are set as in this column."""
        loaded = handle.concepts()
        if self.settings and not loaded:
            raise ValueError(f"--grid {self.settings[0][1]}=…: there is no concept to set; give one with --concept.")
        try:
            for which, key, value in self.settings:
                for name in loaded if which is None else [which]:
                    handle.set(name, **{key: value})
            yield
        finally:
            for name, before in loaded.items():
                handle.set(name, **{key: getattr(before, key) for key in _OF_CONCEPTS})


def cells(grid: list[str] | None, *, steps: int | None, guidance_scale: float | None) -> list[Cell]:
    """The columns that `--grid SETTING=VALUES` asks for, all combinations. ValueError says which settings there are."""
    axes = [_axis(text) for text in grid or ()]
    names = [axis[0][:2] for axis in axes]
    if len(set(names)) < len(names):
        raise ValueError("--grid: a setting is given twice; put all its values into one.")
    found = []
    for choice in itertools.product(*axes):
        plain = {key: value for _, key, value in choice if key in _OF_PICTURES}
        title = ", ".join(f"{'' if which is None else f'<{which}> '}{key.replace('_', ' ')} {value:g}" for which, key, value in choice)
        own = tuple((which, key, value) for which, key, value in choice if key not in _OF_PICTURES)
        found.append(Cell(plain.get("steps", steps), plain.get("guidance_scale", guidance_scale), own, title))
    return found


def _axis(text: str) -> list[tuple[str | None, str, Any]]:
    setting, _, values = text.partition("=")
    which, dot, key = setting.strip().rpartition(".")
    key = key.replace("-", "_")
    kind = _OF_PICTURES.get(key, float if key in _OF_CONCEPTS else None)
    if kind is None or (dot and key in _OF_PICTURES):
        known = ", ".join((*_OF_PICTURES, *_OF_CONCEPTS))
        raise ValueError(f"--grid {text!r}: settings are {known}, and NAME.bias and the like for one concept.")
    try:
        found = [kind(value) for value in values.split(",") if value.strip()]
    except ValueError:
        raise ValueError(f"--grid {text!r}: its values must be numbers with commas between them.") from None
    if not found or (key == "steps" and min(found) < 1):
        raise ValueError(f"--grid {text!r}: it needs values, as in {setting}=1,2{', all positive' if key == 'steps' else ''}.")
    return [(which.strip("<>") or None, key, value) for value in found]


def prepare(
    pipe: Any,
    *,
    scheduler: str | None = None,
    width: int | None = None,
    height: int | None = None,
    init_image: Path | None = None,
    init_strength: float = 0.8,
    mask_image: Path | None = None,
    control_image: Path | None = None,
    controlnet: Path | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The pipeline that draws this, of the same parts, and the options of its call beside prompts and seeds.

    "after_step" among them is for its `callback_on_step_end`.

    ValueError for options that do not go together, with what is missing.
    """
    from perfusion.base import denoiser
    from perfusion.cli.inpainting import KeepOutside, known

    inpainting = denoiser(pipe).config.in_channels == 9
    if (mask_image is not None or inpainting) and init_image is None:
        what = "this model fills in part of a picture" if inpainting else "--mask-image says where a picture is drawn anew"
        raise ValueError(f"{what}: give the picture with --init-image.")
    if inpainting and mask_image is None:
        raise ValueError("this model fills in part of a picture: say which with --mask-image.")
    if (control_image is None) != (controlnet is None):
        missing = "--controlnet" if controlnet is None else "--control-image"
        raise ValueError(f"--control-image and --controlnet go together: {missing} is missing.")
    _check_sizes(pipe, width, height)
    if scheduler is not None:
        pipe.scheduler = _scheduler(pipe, scheduler)
    size = _size(pipe, width, height, init_image)
    options: dict[str, Any] = {}
    if init_image is not None:
        options |= {"image": _picture("--init-image", init_image, size), "strength": init_strength}
    if mask_image is not None:
        options["mask_image"] = _picture("--mask-image", mask_image, size, mask=True)
        if options["mask_image"].getextrema()[1] < 128:
            raise ValueError(f"--mask-image: {str(mask_image)!r} is black everywhere, so nothing would be drawn anew; white is drawn.")
    if control_image is not None:
        options["image" if init_image is None else "control_image"] = _picture("--control-image", control_image, size)
    own = mask_image is not None and not known(denoiser(pipe))
    pipe = _pipeline(pipe, init_image is not None, mask_image is not None and not own, controlnet)
    if own:
        options["after_step"] = KeepOutside(pipe, options["image"], options.pop("mask_image"))
    if width is not None or height is not None or mask_image is not None:
        if "width" in _parameters(pipe):
            options |= {"width": size[0], "height": size[1]}
    return pipe, options


def _parameters(pipe: Any) -> set[str]:
    import inspect

    return set(inspect.signature(type(pipe).__call__).parameters)


def _check_sizes(pipe: Any, width: int | None, height: int | None) -> None:
    for name, value in (("--width", width), ("--height", height)):
        if value is not None and value % pipe.vae_scale_factor:
            raise ValueError(f"{name} must be a multiple of {pipe.vae_scale_factor}, the side of one latent, got {value}")


def _size(pipe: Any, width: int | None, height: int | None, image: Path | None) -> tuple[int, int]:
    """(width, height) of what is drawn: as asked for, or the picture's own shape at the model's size, or the model's square."""
    from perfusion.base import denoiser
    from perfusion.base.parts import latent_multiple

    side = denoiser(pipe).config.sample_size
    side = (side if isinstance(side, int) else max(side)) * pipe.vae_scale_factor
    if image is None or width is not None or height is not None:
        return width or side, height or side
    from perfusion.training.data import bucket

    step = pipe.vae_scale_factor * latent_multiple(denoiser(pipe))
    return bucket(_open("--init-image", image).size, side, step)


def _open(option: str, path: Path) -> Any:
    from perfusion.pictures import open_picture

    try:
        return open_picture(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: {str(path)!r} cannot be read as a picture: {error}.") from error


def _picture(option: str, path: Path, size: tuple[int, int], mask: bool = False) -> Any:
    from PIL import Image, ImageOps

    from perfusion.masks import flatten, read_mask

    if mask:
        image = Image.fromarray((read_mask(path) * 255).round().byte().numpy())
    else:
        image = flatten(_open(option, path))
    return ImageOps.fit(image, size, Image.Resampling.BILINEAR if mask else Image.Resampling.LANCZOS)


def _scheduler(pipe: Any, name: str) -> Any:
    import diffusers

    found = name.lower().replace("_", "-")  # DDIM and euler_a, as other tools write them
    if found not in SCHEDULERS:
        raise ValueError(f"--scheduler must be one of {', '.join(SCHEDULERS)}, got {name!r}")
    cls, options = SCHEDULERS[found]
    return getattr(diffusers, cls).from_config(pipe.scheduler.config, **options)


def _pipeline(pipe: Any, image: bool, mask: bool, controlnet: Path | None) -> Any:
    """Another pipeline of the same parts where pictures are given."""
    import diffusers

    if not image and controlnet is None:
        return pipe
    extra = {}
    if controlnet is not None:
        model = diffusers.ControlNetModel.from_pretrained(controlnet, torch_dtype=pipe.unet.dtype, local_files_only=True)
        extra["controlnet"] = model.to(pipe.device)
    kind = "Inpainting" if mask else "Image2Image" if image else "Text2Image"
    made = getattr(diffusers, f"AutoPipelineFor{kind}").from_pipe(pipe, **extra)
    made.set_progress_bar_config(disable=True)
    return made
