"""Picture files as cameras, phones and image programs write them."""

import io

import numpy
import pytest
from PIL import Image, ImageCms

from perfusion import pictures
from perfusion.pictures import open_picture, upright


def ramp(size=(32, 8)):
    x = numpy.linspace(0, 1, size[0])[None].repeat(size[1], 0)
    return x.astype(numpy.float32)


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0, 1e6])
def test_a_floating_point_tiff_is_scaled(tmp_path, top):
    Image.fromarray(ramp() * top).save(tmp_path / "a.tiff")
    opened = open_picture(tmp_path / "a.tiff")
    assert opened.mode == "L" and numpy.abs(numpy.asarray(opened) / 255 - ramp()).max() < 0.003


def test_a_floating_point_tiff_with_nan_is_refused(tmp_path):
    Image.fromarray(ramp() * float("nan")).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="floating point values are not all finite"):
        open_picture(tmp_path / "a.tiff")


def wide_gamut() -> bytes:
    """An RGB profile whose linear ramp is not sRGB's: built from another one, of gamma 1 by its tags."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    for number in range(count):
        at = 132 + 12 * number
        tag, offset, size = bytes(profile[at : at + 4]), *(int.from_bytes(profile[at + 4 * k : at + 4 * k + 4], "big") for k in (1, 2))
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            profile[offset : offset + 12] = b"curv" + bytes(4) + bytes(4)  # no entries: the identity
        if tag == b"desc":
            profile[offset : offset + size] = bytes(profile[offset : offset + size]).replace("sRGB".encode("utf-16-be"), "xxxx".encode("utf-16-be")).replace(b"sRGB", b"xxxx")
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_an_embedded_profile_is_converted_to_srgb(tmp_path, mode):
    grey = (ramp() * 255).round().astype(numpy.uint8)
    image = Image.fromarray(numpy.stack([grey] * 3, -1)).convert(mode)
    if mode == "RGBA":
        image.putalpha(77)
    image.save(tmp_path / "a.png", icc_profile=wide_gamut())
    opened = open_picture(tmp_path / "a.png")
    linear = grey / 255
    expected = numpy.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    values = numpy.asarray(opened)
    assert numpy.abs(values[..., 0] - expected).max() < 3 and opened.mode == mode
    if mode == "RGBA":
        assert (values[..., 3] == 77).all()


def test_srgb_itself_changes_no_bit_and_a_damaged_profile_is_passed_over(tmp_path):
    noise = numpy.random.default_rng(0).integers(0, 256, (8, 8, 3), numpy.uint8)
    plain = Image.fromarray(noise)
    plain.save(tmp_path / "a.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert (numpy.asarray(open_picture(tmp_path / "a.png")) == noise).all()
    plain.save(tmp_path / "b.png", icc_profile=b"not a profile")
    with pytest.warns(UserWarning, match="colour profile cannot be read"):
        assert (numpy.asarray(open_picture(tmp_path / "b.png")) == noise).all()


def test_a_huge_picture_is_refused_for_what_it_is(tmp_path, monkeypatch):
    Image.new("L", (200, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20000 * 100 // 225)  # as a picture of 200 megapixels is to Pillow's own limit
    with pytest.raises(ValueError, match=r"it has 0 megapixels, and at most 0 are read. Scale it down"):
        open_picture(tmp_path / "a.png")


def test_a_large_photo_below_the_limit_is_read_without_a_word(tmp_path, monkeypatch, recwarn):
    Image.new("L", (200, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15000)
    assert open_picture(tmp_path / "a.png").size == (200, 100) and not recwarn.list


def test_heic_is_read_with_its_package_and_named_without(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    grey = (ramp((64, 64)) * 255).astype(numpy.uint8)
    image = Image.fromarray(numpy.stack([grey] * 3, -1))
    buffer = io.BytesIO()
    image.save(buffer, "HEIF", quality=95)
    (tmp_path / "a.heic").write_bytes(buffer.getvalue())
    assert numpy.abs(numpy.asarray(open_picture(tmp_path / "a.heic").convert("L")).astype(int) - grey).mean() < 4
    monkeypatch.setattr(pictures, "_heif", lambda: False)
    with pytest.raises(ValueError, match="it is HEIC, which needs pillow-heif: pip install pillow-heif"):
        open_picture(tmp_path / "a.heic")


def test_deep_pictures_in_memory_are_scaled_too():
    image = Image.fromarray((ramp() * 65535).astype(numpy.uint16))
    assert numpy.abs(numpy.asarray(upright(image)) / 255 - ramp()).max() < 0.003
