"""The training pictures: reading, cropping, captions, masks, and their latents, computed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from perfusion.masks import ClipSeg, flatten, is_sidecar, latent_mask, load_mask
from perfusion.training.config import TrainingConfig

__all__ = ["Latents", "Picture", "encode_pictures", "read_pictures"]

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclasses.dataclass
class Picture:
    """One training picture: pixels [3, R, R] in [-1, 1], mask [R, R] in [0, 1] or None, and its captions with "{}"."""

    path: str
    pixels: Tensor
    mask: Tensor | None
    captions: tuple[str, ...]


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

    A file NAME.txt beside NAME.png holds its captions, one a line; masks as in `perfusion.masks.load_mask`. The shorter
    side is scaled to `resolution` and the middle square kept. ValueError for no pictures, an unreadable one, a caption
    without the concept in it, or masks on some pictures only.
    """
    if isinstance(images, (str, Path)):
        folder = Path(images)
        if not folder.is_dir():
            raise ValueError(f"images: {str(folder)!r} is not a folder; give a folder of pictures, or a list of paths.")
        images = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in ENDINGS and not is_sidecar(path)]
        if not images:
            raise ValueError(f"images: no pictures in {str(folder)!r}; looked for {', '.join(ENDINGS)}.")
    pictures = [_read(number, image, config, resolution, clipseg) for number, image in enumerate(images)]
    if not pictures:
        raise ValueError("images: the list is empty; a concept takes about 4 to 7 pictures.")
    bare = [picture.path for picture in pictures if picture.mask is None]
    if bare and len(bare) < len(pictures):
        raise ValueError(f"images: some pictures have a mask and some have none ({', '.join(bare)}); give all of them one, or none.")
    return pictures


def _read(number: int, image: Any, config: TrainingConfig, resolution: int, clipseg: Any) -> Picture:
    path = Path(f"image {number}") if isinstance(image, Image.Image) else Path(image)
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(path)
        opened.load()
    except OSError as error:
        raise ValueError(f"images: {str(path)!r} cannot be read as a picture: {error}") from error
    mask = load_mask(path, opened, clipseg=clipseg, superclass=config.superclass)
    grey = None if mask is None else ImageOps.exif_transpose(_like(Image.fromarray(mask.numpy(), mode="F"), opened))
    pixels = _tensor(_square(flatten(ImageOps.exif_transpose(opened)), resolution)) / 127.5 - 1
    mask = None if grey is None else _tensor(_square(grey, resolution))[0].clamp(0, 1)
    return Picture(str(path), pixels, mask, _captions(path, config))


def _like(mask: Image.Image, picture: Image.Image) -> Image.Image:
    """A mask lies on the picture as stored: give it the same orientation tag."""
    mask.getexif().update(picture.getexif())
    return mask


def _square(image: Image.Image, resolution: int) -> Image.Image:
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC if image.mode != "F" else Image.Resampling.BILINEAR)


def _tensor(image: Image.Image) -> Tensor:
    import numpy

    array = torch.from_numpy(numpy.array(image, dtype=numpy.float32))
    return array.permute(2, 0, 1) if array.dim() == 3 else array[None]


def _captions(path: Path, config: TrainingConfig) -> tuple[str, ...]:
    sidecar = path.with_suffix(".txt")
    if not sidecar.is_file():
        return config.instance_prompts
    lines = [line.strip() for line in sidecar.read_text(encoding="utf-8").splitlines() if line.strip()]
    captions = tuple(line.replace(f"<{config.name}>", "{}").replace("*", "{}") for line in lines)
    for caption, line in zip(captions, lines):
        if caption.count("{}") != 1:
            raise ValueError(f'images: {str(sidecar)!r} must name the concept once in each line, as <{config.name}>, * or {{}}; came {line!r}.')
    if not captions:
        raise ValueError(f"images: {str(sidecar)!r} is empty; write a caption into it or remove it.")
    return captions


@torch.no_grad()
def encode_pictures(pipe: Any, pictures: list[Picture]) -> Latents:
    """Latents of all pictures and their mirror images, scaled as the UNet expects them, in float32 on the pipeline's device.

    What is drawn anew at each step, the posterior's noise, is not in the cache: mean and deviation are.
    """
    vae, device = pipe.vae, pipe._execution_device
    dtype = torch.float32 if getattr(vae.config, "force_upcast", False) else vae.dtype
    before, vae = vae.dtype, vae.to(dtype)
    means, deviations = [], []
    for picture in pictures:
        pair = torch.stack([picture.pixels, picture.pixels.flip(-1)]).to(device, dtype)
        encoded = vae.encode(pair)
        if hasattr(encoded, "latent_dist"):
            means.append(encoded.latent_dist.mean.float())
            deviations.append(encoded.latent_dist.std.float())
        else:  # autoencoders that are not variational (AutoencoderTiny)
            means.append(encoded.latents.float())
    vae.to(before)
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    mean = (torch.stack(means) - shift) * scale
    mask = None
    if pictures[0].mask is not None:
        both = torch.stack([torch.stack([picture.mask, picture.mask.flip(-1)]) for picture in pictures])
        mask = latent_mask(both.to(device), tuple(mean.shape[-2:]))
    return Latents(mean, torch.stack(deviations) * scale if deviations else None, mask)
