"""Soft masks of the subject in training images, and the loss they weight.

    from perfusion.masks import latent_mask, load_mask, masked_loss
    mask = load_mask("teddy.jpg", image)                    # [H, W] or None
    weight = latent_mask(mask, (64, 64))                    # [64, 64], its own maximum is 1
    loss = masked_loss(prediction, noise, weight[None])     # [1]

Source: arXiv 2305.01644 weights the training loss by a soft zero-shot segmentation of the superclass. How the mask is
normalised is open there. Here each mask is divided by its own maximum, once, and the loss is the weighted mean per image:
Σ m err² / Σ m. So a small subject counts as much as a large one, and a mask of ones gives the plain mean.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from perfusion.files import user_path
from perfusion.pictures import eight_bits, is_picture, opened

__all__ = ["ClipSeg", "find_mask", "flatten", "latent_mask", "load_mask", "mask_rank", "masked_stem", "masked_loss", "read_mask"]

MASK_MARKS = ("-masklabel", ".mask", "_mask", "-mask", "_masklabel")  # before any picture's ending; the first that is there counts
# A subject that CLIPSeg gives less than this anywhere is not in the picture, and normalising would train on noise.
CLIPSEG_FLOOR = 0.05
BACKGROUND = (255, 255, 255)


def masked_stem(path: str | Path) -> str | None:
    """The stem of the picture that a file is the mask of, by its name: "a" for a-masklabel.PNG; None for other names."""
    path = Path(path)
    mark = _mark(path)
    return None if mark is None else path.stem[: -len(mark)]


def mask_rank(path: str | Path) -> int:
    """Which of two masks of one picture counts: the one of the lower rank."""
    mark = _mark(Path(path))
    return len(MASK_MARKS) if mark is None else MASK_MARKS.index(mark)


def _mark(path: Path) -> str | None:
    stem = path.stem.lower()
    return next((mark for mark in MASK_MARKS if stem.endswith(mark) and len(stem) > len(mark)), None) if is_picture(path) else None


def find_mask(path: str | Path) -> Path | None:
    """The mask file beside a training image; capitals matter only where two files differ by nothing else."""
    path = Path(path)
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    masks = [each for each in beside if (stem := masked_stem(each)) is not None and stem.lower() == path.stem.lower() and each.is_file()]
    return min(masks, key=lambda each: (masked_stem(each) != path.stem, mask_rank(each)), default=None)


def flatten(image: Image.Image) -> Image.Image:
    """The picture as RGB. Transparent parts show white.

    White is what pretrained models know best behind a cut-out object. What a transparent pixel stores instead (often black,
    often left-overs of the old background) was not meant to be seen, and latents near the subject's edge would see it.
    """
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    picture = Image.new("RGB", image.size, BACKGROUND)
    picture.paste(image, mask=image.getchannel("A"))
    return picture


def load_mask(
    image_path: str | Path,
    image: Image.Image,
    *,
    sidecar: Path | None | Literal["beside"] = "beside",
    clipseg: ClipSeg | str | Path | None = None,
    superclass: str | None = None,
) -> Tensor | None:
    """The mask of the subject: [H, W] float32 in [0, 1], 1 on the subject; None where there is no source for one.

    The first of these that exists: a file beside the image named as `find_mask` says (white is the subject; or `sidecar`,
    None for no file), an alpha channel that is not opaque everywhere (see `flatten` for what the picture becomes), CLIPSeg.
    image: the opened picture, unflattened. clipseg: a folder with the weights, or a ClipSeg. superclass: what it looks for.
    Raises ValueError for a mask that cannot be read, has another size than the image, or is zero everywhere, and for a
    superclass that CLIPSeg does not see in the image; FileNotFoundError for a missing weights folder.
    """
    image_path = user_path(image_path)
    height, width = image.height, image.width
    if sidecar == "beside":
        sidecar = find_mask(image_path)
    if sidecar is not None:
        mask = read_mask(sidecar)
        if mask.shape != (height, width):
            raise ValueError(f"mask {sidecar} is {mask.shape[1]} x {mask.shape[0]} pixels, its image {image_path} is {width} x {height}")
        return _not_empty(mask, f"mask {sidecar} is black everywhere; the subject should be white")
    if image.has_transparency_data:
        alpha = torch.from_numpy(numpy.asarray(image.convert("RGBA").getchannel("A"), dtype=numpy.float32) / 255)
        if alpha.min() < 1:
            return _not_empty(alpha, f"image {image_path} is transparent everywhere")
    if clipseg is None:
        return None
    if not superclass:
        raise ValueError("load_mask: CLIPSeg needs the superclass to look for")
    if not isinstance(clipseg, ClipSeg):
        clipseg = _clipseg(str(clipseg))
    mask = clipseg(flatten(image), superclass)
    if mask.max() < CLIPSEG_FLOOR:
        raise ValueError(
            f"CLIPSeg sees no {superclass!r} in {image_path}: its highest probability is {float(mask.max()):.3f}. "
            f"Give a mask file {image_path.stem}{MASK_MARKS[0]}.png, another superclass word, or leave the image out"
        )
    return mask


def read_mask(path: Path) -> Tensor:
    """[H, W] float32 in [0, 1] from any picture file, 16-bit ones included.

    A mask may be drawn in grey, or as a shape on a transparent ground: then the alpha channel is the shape, and grey counts
    where it says anything, that is where what can be seen is not of one grey.
    """
    try:
        with opened(path) as file:
            deep = file.mode.startswith("I")  # eight_bits would round them
            values = numpy.asarray(file if deep else eight_bits(ImageOps.exif_transpose(file)).convert("LA"), dtype=numpy.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"mask {path} cannot be read as a picture: {error}") from error
    if deep:
        return torch.from_numpy(values / 65535)
    grey, alpha = torch.from_numpy(values / 255).unbind(-1)
    seen = grey[alpha > 0]
    if alpha.min() == 1 or seen.numel() == 0:
        return grey.contiguous() if alpha.min() == 1 else alpha.contiguous()
    return (alpha if seen.min() == seen.max() else grey * alpha).contiguous()


def _not_empty(mask: Tensor, complaint: str) -> Tensor:
    if not mask.any():
        raise ValueError(complaint)
    return mask


class ClipSeg:
    """Zero-shot segmentation by a CLIPSeg model (arXiv 2112.10003) from a local folder; nothing is downloaded.

    folder: what `CLIPSegForImageSegmentation.save_pretrained` and `CLIPSegProcessor.save_pretrained` write.
    Raises FileNotFoundError for a missing folder, ValueError for one that does not hold such a model.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

        folder = user_path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no such CLIPSeg folder: {folder}")
        try:
            self.processor = CLIPSegProcessor.from_pretrained(folder, local_files_only=True)
            self.model = CLIPSegForImageSegmentation.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} does not hold a CLIPSeg model with its processor: {error}") from error
        self.model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, image: Image.Image, superclass: str) -> Tensor:
        """Probability that a pixel shows `superclass`: [H, W] float32 in [0, 1] on the CPU. image: RGB, any size."""
        inputs = self.processor(text=[superclass], images=[image], return_tensors="pt").to(self.model.device)
        logits = self.model(**inputs).logits  # [1, h, w]; older transformers leave out the 1
        probability = torch.sigmoid(logits.float()).reshape(1, 1, *logits.shape[-2:])
        size = (image.height, image.width)
        return functional.interpolate(probability, size, mode="bilinear", align_corners=False)[0, 0].cpu()


@functools.lru_cache(maxsize=1)
def _clipseg(folder: str) -> ClipSeg:
    """One model serves all training images."""
    return ClipSeg(folder)


def latent_mask(mask: Tensor, latent_size: tuple[int, int]) -> Tensor:
    """Loss weights on the latent grid: the mask averaged over each latent's area, divided by its own maximum.

    mask: [..., H, W] float, ≥ 0. latent_size: (h, w) of the latents. Returns [..., h, w], same dtype, maximum 1 per mask.
    Raises ValueError for a mask that is zero everywhere, for example after a crop that misses the subject.
    """
    if mask.dim() < 2 or not mask.is_floating_point():
        raise ValueError(f"latent_mask: mask must be [..., H, W] and floating point, not {list(mask.shape)} {mask.dtype}")
    small = functional.adaptive_avg_pool2d(mask.reshape(-1, 1, *mask.shape[-2:]), latent_size)
    maximum = small.amax((-2, -1), keepdim=True)
    if not (maximum > 0).all():
        raise ValueError("latent_mask: a mask is zero everywhere; was the subject cropped away?")
    return (small / maximum).reshape(*mask.shape[:-2], *latent_size)


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Weighted mean square error of each image: Σ m (prediction − target)² / Σ m, over channels and pixels.

    prediction, target: [B, C, h, w], any float dtype. mask: [B, h, w] or [B, 1, h, w], ≥ 0, not zero everywhere, its scale
    cancels; None weighs all pixels alike. Returns [B] float32 (float64 for float64 inputs), differentiable in prediction.
    Raises ValueError for shapes that do not fit: a mask that broadcasts by accident would weigh the wrong pixels.
    """
    if prediction.dim() != 4 or prediction.shape != target.shape:
        raise ValueError(
            f"masked_loss: prediction and target must both be [B, C, h, w], not {list(prediction.shape)} and {list(target.shape)}"
        )
    wide = torch.promote_types(prediction.dtype, torch.float32)
    error = (prediction.to(wide) - target.to(wide)).square().mean(1)  # [B, h, w]
    if mask is None:
        return error.mean((1, 2))
    weight = mask[:, 0] if mask.dim() == 4 and mask.shape[1] == 1 else mask
    if weight.shape != error.shape:
        expected = list(error.shape)
        raise ValueError(f"masked_loss: mask must be {expected} or {[expected[0], 1, *expected[1:]]}, not {list(mask.shape)}")
    weight = weight.to(wide)
    return (weight * error).sum((1, 2)) / weight.sum((1, 2))
