"""Pictures from strangers: read only where they are small enough and of a known format, and never by a path or an address."""

from __future__ import annotations

import base64
import binascii
import io
import warnings

import numpy
from PIL import Image

from perfusion.pictures import upright

__all__ = ["BadPicture", "from_base64", "mask_of", "read_picture", "rgb_of"]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


class BadPicture(ValueError):
    """Bytes that are no picture that is taken here; the message says why."""


def read_picture(data: bytes, pixels: int) -> Image.Image:
    """The picture in a file of at most so many pixels, upright and in sRGB. Its size is read, and refused, before it is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                if opened.width * opened.height > pixels:
                    raise BadPicture(f"it has {opened.width} x {opened.height} pixels, and at most {pixels} are taken")
                opened.load()
                return upright(opened)
    except BadPicture:
        raise
    except Image.DecompressionBombError:
        raise BadPicture(f"it has more than the {pixels} pixels that are taken") from None
    except Image.UnidentifiedImageError:
        raise BadPicture(f"it is none of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow raises whatever it meets in damaged files
        raise BadPicture(f"it is damaged: {error}") from None


def from_base64(text: str, most: int) -> bytes:
    """The bytes of base64 text, which may come as a data: URL. BadPicture; any other URL is no base64."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if len(text) > most * 4 // 3 + 4:
        raise BadPicture(f"it is larger than {most} bytes")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadPicture("it is not base64; no address is fetched") from None


def rgb_of(image: Image.Image, width: int, height: int) -> numpy.ndarray:
    """uint8 [height, width, 3], on white where it is transparent."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return numpy.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)).copy()


def mask_of(image: Image.Image, width: int, height: int, *, transparent: bool = False) -> numpy.ndarray:
    """uint8 [height, width]: 255 where the picture is white, or, with `transparent`, where its alpha channel is clear."""
    if transparent and image.has_transparency_data:
        grey = image.convert("RGBA").getchannel("A").point(lambda value: 255 - value)
    else:
        grey = image.convert("L")
    return numpy.asarray(grey.resize((width, height), Image.Resampling.BOX)).copy()
