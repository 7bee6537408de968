"""The training pictures: reading, cropping, captions, masks, and their latents, computed once."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from perfusion.masks import SIDECAR_ENDINGS, ClipSeg, flatten, has_sidecar, is_sidecar, latent_mask, load_mask
from perfusion.training.config import TrainingConfig

__all__ = ["Latents", "Picture", "digest", "encode_pictures", "read_pictures"]

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FEW = 4  # from fewer pictures the background and the pose are learned as well


@dataclasses.dataclass
class Picture:
    """One training picture: pixels [3, R, R] in [-1, 1], mask [R, R] in [0, 1] or None, its captions with "{}", and the size it came in."""

    path: str
    pixels: Tensor
    mask: Tensor | None
    captions: tuple[str, ...]
    size: tuple[int, int]


@dataclasses.dataclass
class Latents:
    """What a step draws from: posterior mean and std [n, 2, C, h, w] (second index: mirrored) and masks [n, 2, h, w] or None."""

    mean: Tensor
    std: Tensor | None
    mask: Tensor | None


def read_pictures(
    images: str | Path | Sequence[Any], config: TrainingConfig, resolution: int, clipseg: ClipSeg | str | Path | None = None
) -> list[Picture]:
    """Read pictures from a folder, or from a list of paths and PIL images.

    A file NAME.txt beside NAME.png holds its captions, one a line; masks as in `perfusion.masks.load_mask`, lying on the
    picture as it is seen, turned as its orientation tag says. The shorter side is scaled to `resolution` and the middle
    square kept. ValueError for no pictures, an unreadable one, a caption without the concept in it, a mask that the middle
    square misses, or masks on some pictures only; FileNotFoundError for CLIPSeg weights that are not there, needed or not; a
    warning for fewer than 4 and for small ones.
    """
    if isinstance(clipseg, (str, Path)) and not Path(clipseg).is_dir():
        raise FileNotFoundError(f"no such CLIPSeg folder: {clipseg}. Give the folder that holds the weights, or leave it out.")
    if isinstance(images, (str, Path)):
        folder = Path(images)
        if not folder.is_dir():
            raise ValueError(f"images: {str(folder)!r} is not a folder; give a folder of pictures.")
        images = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in ENDINGS and not is_sidecar(path)]
        if not images:
            raise ValueError(f"images: no pictures in {str(folder)!r}; looked for {', '.join(ENDINGS)}.")
    pictures = [_read(number, image, config, resolution, clipseg) for number, image in enumerate(images, start=1)]
    if not pictures:
        raise ValueError("images: the list is empty; a concept takes about 4 to 7 pictures.")
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
    cut = [picture.path for picture in pictures if picture.mask is not None and not has_sidecar(picture.path)]
    alpha = (
        f" The mask of {', '.join(cut)} is the alpha channel, as parts are transparent: save without transparency to have none."
        if cut
        else ""
    )
    raise ValueError(
        f"images: some pictures have a mask and some have none ({', '.join(bare)}); give all of them one, such as "
        f"{Path(bare[0]).stem}{SIDECAR_ENDINGS[0]}, or none.{alpha}"
    )


def _read(number: int, image: Any, config: TrainingConfig, resolution: int, clipseg: Any) -> Picture:
    given = isinstance(image, Image.Image)
    path = Path(f"image {number}" if given else image)
    try:
        with contextlib.nullcontext(image) if given else Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises for damaged files
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"images: {str(path)!r} cannot be read as a picture: there is no such file. Check the path.") from error
        raise ValueError(f"images: {str(path)!r} cannot be read as a picture: {error}. Save it anew, or leave it out.") from error
    mask = load_mask(path, upright, clipseg=clipseg, superclass=config.superclass)
    pixels = torch.from_numpy(numpy.array(_square(flatten(_eight_bits(upright)), resolution), dtype=numpy.float32)) / 127.5 - 1
    if mask is not None:
        mask = torch.from_numpy(numpy.array(_square(Image.fromarray(mask.numpy()), resolution))).clamp(0, 1)
        if not mask.any():
            raise ValueError(f"images: the mask of {str(path)!r} is black in the middle square, which training sees; crop the picture.")
    return Picture(str(path), pixels.permute(2, 0, 1).contiguous(), mask, _captions(path, config), upright.size)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits, which Pillow would clip to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((numpy.asarray(image).clip(0, 65535) / 257).round().astype(numpy.uint8))


def _square(image: Image.Image, resolution: int) -> Image.Image:
    # a mask is bilinear: bicubic would leave [0, 1]
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.BILINEAR if image.mode == "F" else Image.Resampling.BICUBIC)


def _captions(path: Path, config: TrainingConfig) -> tuple[str, ...]:
    sidecar = path.with_suffix(".txt")
    if not sidecar.is_file():
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
def encode_pictures(pipe: Any, pictures: Sequence[Picture]) -> Latents:
    """Latents of all pictures and their mirror images, scaled as the UNet expects them, in float32 on the pipeline's device.

    What is drawn anew at each step, the posterior's noise, is not in the cache: mean and deviation are. A VAE that
    overflows in half precision (SDXL's) runs in float32 and gets its precision back.
    """
    vae, device = pipe.vae, pipe._execution_device
    before = vae.dtype
    dtype = torch.float32 if getattr(vae.config, "force_upcast", False) else before
    means, deviations = [], []
    try:
        _cast(vae, dtype)
        for picture in pictures:
            encoded = vae.encode(torch.stack([picture.pixels, picture.pixels.flip(-1)]).to(device, dtype))
            if hasattr(encoded, "latent_dist"):
                means.append(encoded.latent_dist.mean.float())
                deviations.append(encoded.latent_dist.std.float())
            else:  # autoencoders that are not variational (AutoencoderTiny)
                means.append(encoded.latents.float())
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
    if model.dtype != dtype:  # diffusers warns about casts, needless ones too
        model.to(dtype)
