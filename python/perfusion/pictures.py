"""Picture files as people have them: phone photos, profiles, 16 bits, floating point, HEIC. One way to open them all.

    image = open_picture("IMG_0001.HEIC")      # upright, in sRGB, of mode L, LA, RGB or RGBA, 8 bits a channel
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy
from PIL import Image, ImageCms, ImageOps

__all__ = ["ENDINGS", "WITH_HEIF", "eight_bits", "is_picture", "open_picture", "opened", "upright"]

ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
WITH_HEIF = (".heic", ".heif")  # with the package pillow-heif
_NEWER = (".avif",)  # where this Pillow can
RAW = (".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf")


@functools.cache
def _heif() -> bool:
    """Whether HEIC pictures can be opened; makes Pillow able to where pillow-heif is installed."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


def is_picture(path: Path) -> bool:
    """Whether a file's ending is one of a picture that can be opened here."""
    ending = path.suffix.lower()
    if ending in WITH_HEIF:
        return _heif()
    return ending in ENDINGS or (ending in _NEWER and ending in Image.registered_extensions())


def unreadable_kind(path: Path) -> str | None:
    """Why a file that is a picture by its ending is none that can be opened here; None for other files and for readable ones."""
    ending = path.suffix.lower()
    if ending in WITH_HEIF and not _heif():
        return "HEIC, which needs pillow-heif: pip install pillow-heif, or save it as JPEG"
    if ending in _NEWER and not is_picture(path):
        return "AVIF, which this Pillow cannot read: save it as JPEG or PNG"
    if ending in RAW:
        return "a raw photo: develop it to JPEG or PNG"
    return None


def open_picture(path: Path) -> Image.Image:
    """The picture as it is seen. ValueError, a sentence without the path, when it cannot be read; FileNotFoundError."""
    with opened(path) as image:
        return upright(image)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The file as Pillow opens it. What goes wrong inside, too, such as damage that shows late, is a ValueError as in `open_picture`."""
    reason = unreadable_kind(path)
    if reason is not None and path.is_file():
        raise ValueError(f"it is {reason}")
    if path.suffix.lower() in WITH_HEIF:
        _heif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # photos of 100 megapixels exist
            with Image.open(path) as image:
                yield image
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError as error:
        pixels = next(iter(re.findall(r"\d+", str(error))), "0")
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ValueError(
            f"it has {int(pixels) / 1e6:.0f} megapixels, and at most {limit / 1e6:.0f} are read. Scale it down: models see far fewer"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise ValueError(str(error)) from error


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its orientation tag says, in sRGB, 8 bits a channel. ValueError for values that are no picture."""
    return in_srgb(eight_bits(ImageOps.exif_transpose(image)))


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 or 32 bits and of floating point, which Pillow would clip to white."""
    if image.mode.startswith("I"):
        return Image.fromarray((numpy.asarray(image).clip(0, 65535) / 257).round().astype(numpy.uint8))
    if image.mode != "F":
        return image
    values = numpy.asarray(image)
    if not numpy.isfinite(values).all():
        raise ValueError("its floating point values are not all finite")
    low, high = min(float(values.min()), 0.0), float(values.max())
    # the scale that the largest value speaks for: 1, 8 bits, 16 bits, or whatever it is
    top = next((scale for scale in (1.0, 255.0, 65535.0) if high <= scale), high)
    return Image.fromarray(((values - low) * (255 / max(top - low, 1e-30))).round().clip(0, 255).astype(numpy.uint8))


def in_srgb(image: Image.Image) -> Image.Image:
    """Colours of an embedded ICC profile converted to sRGB, transparency kept. A damaged profile is passed over with a warning."""
    data = image.info.get("icc_profile")
    if not data:
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return image
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        space = profile.profile.xcolor_space.strip()
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space)
        if mode is None or (mode == "CMYK") != (image.mode == "CMYK"):
            return image
        plain = image if image.mode == mode else image.convert(mode)
        converted = ImageCms.profileToProfile(plain, profile, _srgb(), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        warnings.warn(f"a picture's colour profile cannot be read ({error}); its colours are taken as sRGB.", stacklevel=2)
        return image
    if alpha is not None:
        converted.putalpha(alpha)
    converted.info.pop("icc_profile", None)
    return converted


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.createProfile("sRGB")
