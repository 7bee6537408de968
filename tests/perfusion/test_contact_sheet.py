"""perfusion.contact_sheet: pictures side by side."""

import numpy
import pytest
import torch
from PIL import Image

from perfusion.contact_sheet import image, sheet


def plain(colour, size=(16, 16), mode="RGB"):
    return Image.new(mode, size, colour)


def test_pixels_become_a_picture():
    pixels = torch.tensor([-1.0, 0.0, 3.0])[:, None, None].expand(3, 2, 4).requires_grad_()
    assert image(pixels).size == (4, 2) and image(pixels).getpixel((0, 0)) == (0, 128, 255)


def test_each_picture_stands_in_its_place():
    page = sheet([plain("red"), plain("green"), plain(200, mode="L")], columns=2, side=32, gap=4)
    assert page.size == (2 * 36 + 4, 2 * 36 + 4) and page.mode == "RGB"
    assert [page.getpixel(at) for at in ((2, 2), (4, 4), (39, 4), (40, 40), (75, 75))] == [
        (255,) * 3,
        (255, 0, 0),
        (255,) * 3,
        (255,) * 3,
        (255,) * 3,
    ]
    assert page.getpixel((40, 35)) == (0, 128, 0) and page.getpixel((4, 40)) == (200, 200, 200)


def test_large_pictures_keep_their_pixels_and_others_follow_the_first():
    noise = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (150, 140, 3), dtype=numpy.uint8))
    page = sheet([noise, plain("red", (7, 9))], gap=0)
    assert page.size == (280, 150) and page.crop((0, 0, 140, 150)).tobytes() == noise.tobytes()
    assert page.getpixel((279, 149)) == (255, 0, 0)


def test_titles_take_a_strip_and_there_is_one_for_each():
    bare, titled = sheet([plain("red")] * 2), sheet([plain("red")] * 2, titles=["β 0.5", ""])
    assert titled.height > bare.height and titled.width == bare.width
    strip = numpy.asarray(titled)[bare.height - 2 :]
    assert (strip[:, :130] < 128).any() and (strip[:, 140:] == 255).all()
    with pytest.raises(ValueError, match="2 images need as many titles, got 1"):
        sheet([plain("red")] * 2, titles=["one"])


def test_no_pictures_make_a_blank_sheet():
    assert set(sheet([]).convert("L").tobytes()) <= {255}
