"""The training pictures: reading, cropping, captions, masks, and their latents, computed once."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from perfusion.files import user_path
from perfusion.masks import MASK_MARKS, ClipSeg, flatten, latent_mask, load_mask
from perfusion.pictures import open_picture, upright
from perfusion.training.offloading import tiled as in_tiles
from perfusion.training.sources import Source, find_sources, summary
from perfusion.training_config import TrainingConfig

__all__ = ["Latents", "Picture", "digest", "encode_pictures", "read_pictures"]

FEW = 4  # from fewer pictures the background and the pose are learned as well


@dataclasses.dataclass
class Picture:
    """One training picture: pixels [3, H, W] in [-1, 1], mask [H, W] in [0, 1] or None, its captions with "{}", and the size it came in.

    The mask is a file's, or else the picture's own alpha channel or CLIPSeg's.
    """

    path: str
    pixels: Tensor
    mask: Tensor | None
    captions: tuple[str, ...]
    size: tuple[int, int]
    mask_file: bool = False


@dataclasses.dataclass
class Latents:
    """What a step draws from: posterior mean and std [n, 2, C, h, w] (second index: mirrored) and masks [n, 2, h, w] or None."""

    mean: Tensor
    std: Tensor | None
    mask: Tensor | None


def read_pictures(
    images: str | Path | Sequence[Any],
    config: TrainingConfig,
    resolution: int,
    clipseg: ClipSeg | str | Path | None = None,
    *,
    step: int = 1,
    tell: Callable[[str], None] | None = None,
) -> list[Picture]:
    """Read pictures from a folder, or from a list of paths and PIL images.

    Masks and captions beside them are found as `perfusion.training.sources` says; masks lie on the picture as it is seen,
    turned as its orientation tag says. The shorter side is scaled to `resolution` and a square kept: the one around the mask's
    centre, or the middle. With `config.buckets` it is a rectangle of the picture's own shape, about as many pixels, sides
    multiples of `step`. tell: gets one paragraph that names every file and what it is; without it, files that are not used are
    warned about. ValueError for no pictures, an unreadable one, a caption without the concept in it, or masks on some pictures
    only; FileNotFoundError for CLIPSeg weights that are not there, needed or not; a warning for fewer than 4 and for small ones.
    """
    if isinstance(clipseg, (str, Path)) and not user_path(clipseg).is_dir():
        raise FileNotFoundError(f"no such CLIPSeg folder: {clipseg}. Give the folder that holds the weights, or leave it out.")
    sources, unused = find_sources(images)
    if tell is not None:
        tell(f"images: {summary(sources, unused)}")
    elif unused:
        warnings.warn(f"images: {summary(sources, unused)}", stacklevel=3)
    pictures = [_read(source, config, resolution, step, clipseg) for source in sources]
    if len(pictures) < FEW:
        warnings.warn(
            f"{len(pictures)} picture{'s are' if len(pictures) > 1 else ' is'} few: a concept takes about 4 to 7, in several places and "
            "from several sides. Otherwise what surrounds the thing becomes part of it; masks and captions help.",
            stacklevel=3,
        )
    small = [f"{picture.path} ({' x '.join(map(str, picture.size))})" for picture in pictures if 2 * min(picture.size) < resolution]
    if small:
        warnings.warn(
            f"pictures smaller than half of the {resolution} x {resolution} pixels that training sees are enlarged, and their blur is "
            f"learned: {', '.join(small)}. Larger ones work better.",
            stacklevel=3,
        )
    _check_masks(pictures)
    return pictures


def _check_masks(pictures: Sequence[Picture]) -> None:
    bare = [picture.path for picture in pictures if picture.mask is None]
    if not bare or len(bare) == len(pictures):
        return
    cut = [picture.path for picture in pictures if picture.mask is not None and not picture.mask_file]
    alpha = (
        f" The mask of {', '.join(cut)} is the alpha channel, as parts are transparent: save without transparency to have none."
        if cut
        else ""
    )
    raise ValueError(
        f"images: some pictures have a mask and some have none ({', '.join(bare)}); give all of them one, such as "
        f"{Path(bare[0]).stem}{MASK_MARKS[0]}.png, or none.{alpha}"
    )


def _read(source: Source, config: TrainingConfig, resolution: int, step: int, clipseg: Any) -> Picture:
    try:
        image = open_picture(source.picture) if isinstance(source.picture, Path) else upright(source.picture)
    except FileNotFoundError as error:
        raise ValueError(f"images: {source.name!r} cannot be read as a picture: there is no such file. Check the path.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"images: {source.name!r} cannot be read as a picture: {error}. Save it anew, or leave it out.") from error
    mask = load_mask(source.name, image, sidecar=source.mask, clipseg=clipseg, superclass=config.superclass)
    size = bucket(image.size, resolution, step) if config.buckets else (resolution, resolution)
    centre = (0.5, 0.5) if mask is None else _centre(mask, size)
    pixels = torch.from_numpy(numpy.array(_crop(flatten(image), size, centre), dtype=numpy.float32)) / 127.5 - 1
    if mask is not None:
        mask = torch.from_numpy(numpy.array(_crop(Image.fromarray(mask.numpy()), size, centre))).clamp(0, 1)
        if not mask.any():
            raise ValueError(f"images: the mask of {source.name!r} is black in the part that training sees; crop the picture.")
    captions = _captions(source.captions, config)
    return Picture(source.name, pixels.permute(2, 0, 1).contiguous(), mask, captions, image.size, source.mask is not None)


def bucket(size: tuple[int, int], resolution: int, step: int) -> tuple[int, int]:
    """(width, height) of the training rectangle of a picture: multiples of `step`, at most resolution² pixels, at most 2 to 1."""
    choices = [(resolution, resolution)]
    for width in range(max(step, -(-resolution // (2 * step)) * step), 2 * resolution + 1, step):
        height = resolution * resolution // width // step * step
        if height >= step and max(width, height) <= 2 * min(width, height):
            choices.append((width, height))
    shape = math.log(size[0] / size[1])
    return min(choices, key=lambda each: (round(abs(math.log(each[0] / each[1]) - shape), 6), -each[0] * each[1], each))


def _centre(mask: Tensor, size: tuple[int, int]) -> tuple[float, float]:
    """Where to crop: shares of what is cut off that lie left of and above the part that is kept, so that it lies around the mask."""
    height, width = mask.shape
    scale = min(width / size[0], height / size[1])
    shares = []
    for weights, whole, kept in ((mask.sum(0), width, size[0] * scale), (mask.sum(1), height, size[1] * scale)):
        middle = float((weights * (torch.arange(whole) + 0.5)).sum() / weights.sum())
        rest = whole - kept
        shares.append(0.5 if rest < 1e-6 else min(max((middle - kept / 2) / rest, 0.0), 1.0))
    return shares[0], shares[1]


def _crop(image: Image.Image, size: tuple[int, int], centre: tuple[float, float]) -> Image.Image:
    # a mask is bilinear: bicubic would leave [0, 1]
    return ImageOps.fit(image, size, Image.Resampling.BILINEAR if image.mode == "F" else Image.Resampling.BICUBIC, centering=centre)


def _captions(sidecar: Path | None, config: TrainingConfig) -> tuple[str, ...]:
    if sidecar is None:
        return config.instance_prompts
    try:
        lines = [line.strip() for line in sidecar.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"images: {str(sidecar)!r} is not text in UTF-8: {error}") from error
    captions = tuple(line.replace(f"<{config.name}>", "{}").replace("*", "{}") for line in lines)
    for caption, line in zip(captions, lines):
        if caption.count("{}") != 1:
            raise ValueError(
                f"images: {str(sidecar)!r} must name the concept once in each line, as <{config.name}>, * or {{}}; came {line!r}."
            )
    if not captions:
        raise ValueError(f"images: {str(sidecar)!r} is empty; write a caption into it or remove it.")
    return captions


def digest(pictures: Sequence[Picture]) -> str:
    """16 hex digits of all that a training sees of its pictures."""
    total = hashlib.sha256()
    for picture in pictures:
        total.update(picture.pixels.numpy().tobytes())
        total.update(b"" if picture.mask is None else picture.mask.numpy().tobytes())
        total.update("\n".join(picture.captions).encode())
    return total.hexdigest()[:16]


@torch.no_grad()
def encode_pictures(pipe: Any, pictures: Sequence[Picture], *, tiled: bool = False) -> Latents:
    """Latents of all pictures and their mirror images, scaled as the UNet expects them, in float32 on the pipeline's device.

    What is drawn anew at each step, the posterior's noise, is not in the cache: mean and deviation are. A VAE that
    overflows in half precision (SDXL's) runs in float32 and gets its precision back. tiled: one picture at a time, in tiles.
    """
    vae, device = pipe.vae, pipe._execution_device
    before = vae.dtype
    dtype = torch.float32 if getattr(vae.config, "force_upcast", False) else before
    means, deviations = [], []
    try:
        _cast(vae, dtype)
        with in_tiles(vae) if tiled else contextlib.nullcontext():
            for picture in pictures:
                both = torch.stack([picture.pixels, picture.pixels.flip(-1)]).to(device, dtype)
                encoded = [vae.encode(each) for each in both.split(1 if tiled else 2)]
                if hasattr(encoded[0], "latent_dist"):
                    means.append(torch.cat([each.latent_dist.mean for each in encoded]).float())
                    deviations.append(torch.cat([each.latent_dist.std for each in encoded]).float())
                else:  # autoencoders that are not variational (AutoencoderTiny)
                    means.append(torch.cat([each.latents for each in encoded]).float())
    finally:
        _cast(vae, before)
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    mean = (torch.stack(means) - shift) * scale
    mask = None
    if pictures[0].mask is not None:
        both = torch.stack([torch.stack([picture.mask, picture.mask.flip(-1)]) for picture in pictures])
        mask = latent_mask(both.to(device), tuple(mean.shape[-2:]))
    return Latents(mean, torch.stack(deviations) * scale if deviations else None, mask)


def _cast(model: Any, dtype: torch.dtype) -> None:
    if model.dtype != dtype:  # diffusers remarks on casts
        torch.nn.Module.to(model, dtype)
