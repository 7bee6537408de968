"""perfusion.training.data: every kind of picture, its captions and mask, and the latents."""

import math
import warnings

import numpy
import pytest
import torch
from PIL import Image

from perfusion.training.data import bucket, digest, encode_pictures, read_pictures
from tests.kernels.tolerance import Exact, as_run, assert_close, assert_same_run
from tests.perfusion.learning import settings, write_pictures
from tests.perfusion.tiny import tiny_sd, tiny_sdxl

SIDE = 16
CONFIG = settings(instance_prompts="a {}")
pytestmark = pytest.mark.filterwarnings("ignore:.*few. a concept takes", "ignore:pictures smaller than half")


def gradient(size=(SIDE, SIDE)):
    """Red grows to the right, green downwards."""
    x, y = numpy.meshgrid(numpy.linspace(0, 255, size[0]), numpy.linspace(0, 255, size[1]))
    return Image.fromarray(numpy.stack([x, y, x * 0 + 60], -1).round().astype(numpy.uint8))


def read(images, config=CONFIG, **options):
    return read_pictures(images, config, SIDE, **options)


def corners(pixels):
    """Rounded tops: [red left, red right, green top, green bottom] of a gradient, 0 to 1."""
    return [round(float(value) / 2 + 0.5, 1) for value in (pixels[0, 8, 0], pixels[0, 8, -1], pixels[1, 0, 8], pixels[1, -1, 8])]


# Pixels


@pytest.mark.parametrize(
    ("mode", "ending"),
    [("RGB", "png"), ("RGB", "jpg"), ("RGB", "webp"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "png"), ("RGB", "bmp"), ("CMYK", "tif")],
)
def test_colour_in_every_mode(tmp_path, mode, ending):
    gradient().convert(mode).save(tmp_path / f"a.{ending}", **({"quality": 100, "subsampling": 0} if ending == "jpg" else {}))
    (picture,) = read(tmp_path)
    assert picture.pixels.shape == (3, SIDE, SIDE) and picture.pixels.dtype == torch.float32 and picture.mask is None
    assert -1 <= picture.pixels.min() and picture.pixels.max() <= 1
    expected = read([gradient()])[0].pixels
    assert (picture.pixels - expected).abs().mean() < 0.1


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16"])
def test_grey_in_every_mode(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray((numpy.asarray(gradient().getchannel("R")).astype(numpy.uint16)) * 257)
    else:
        image = gradient().getchannel("R").convert(mode)
    image.save(tmp_path / "a.png")
    pixels = read(tmp_path)[0].pixels
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])
    assert pixels[0, :, :4].mean() < -0.5 and pixels[0, :, -4:].mean() > 0.5


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (7, 9)])
def test_the_middle_square_is_kept_and_not_squeezed(size):
    pixels = read([gradient(size)])[0].pixels
    long = max(size) / min(size)
    margin = (1 - 1 / long) / 2
    wide = size[0] > size[1]
    left, right, top, bottom = corners(pixels)
    across, along = ((top, bottom), (left, right)) if wide else ((left, right), (top, bottom))
    assert across == pytest.approx((0, 1), abs=0.1) and along == pytest.approx((margin, 1 - margin), abs=0.11)


def test_a_picture_is_seen_as_its_orientation_tag_says_and_so_is_its_mask(tmp_path):
    image = gradient((40, 20))
    tag = Image.Exif()
    tag[0x0112] = 6  # stored lying on its side: turn it by a quarter, clockwise
    image.save(tmp_path / "turned.jpg", exif=tag, quality=100, subsampling=0)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert upright.size == (20, 40)
    half = Image.new("L", upright.size)
    half.paste(255, (0, 0, 10, 40))
    half.save(tmp_path / "turned-masklabel.png")
    (picture,) = read(tmp_path)
    assert (picture.pixels - read([upright])[0].pixels).abs().max() < 0.1
    assert picture.mask[:, :7].min() == 1 and picture.mask[:, 9:].max() == 0


def test_transparent_parts_are_white_and_are_the_mask(tmp_path):
    image = gradient((20, 24)).convert("RGBA")
    image.putalpha(Image.new("L", (20, 24), 0))
    image.paste(gradient((10, 24)).convert("RGBA"), (0, 0))
    image.save(tmp_path / "cut.png")
    (picture,) = read(tmp_path)
    assert picture.pixels[:, :, -6:].min() > 0.98 and picture.mask[:, :6].min() > 0.98 and picture.mask[:, -6:].max() < 0.02


# Lists, folders, errors


def test_paths_and_pictures_may_be_mixed_and_folders_are_read_in_order(tmp_path):
    folder = write_pictures(tmp_path / "in", 4, mask=True)
    (folder / "notes.md").write_text("not a picture")
    (folder / "sub").mkdir()
    pictures = read(folder)
    assert [picture.path for picture in pictures] == [str(folder / f"{number}.png") for number in range(4)]
    assert [picture.path for picture in read([gradient(), gradient()])] == ["image 1", "image 2"]
    assert digest(pictures) == digest(read(str(folder))) != digest(pictures[:3])


def test_few_pictures_are_warned_about(tmp_path):
    with pytest.warns(UserWarning, match="1 picture is few: a concept takes about 4 to 7"):
        read([gradient()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read([gradient()] * 4)


def test_small_pictures_are_warned_about(tmp_path):
    gradient((1, 1)).save(tmp_path / "dot.png")
    with pytest.warns(UserWarning, match=r"half of the 16 x 16 pixels .*learned: [^,]*dot.png \(1 x 1\), image 2 \(40 x 7\). Larger"):
        read([tmp_path / "dot.png", gradient((40, 7)), gradient((8, 8)), gradient()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "is not a folder; give a folder of pictures"),
        (lambda folder: folder, "no pictures in .*; looked for .png"),
        (lambda folder: [], "the list is empty; a concept takes about 4 to 7 pictures"),
        (lambda folder: [folder / "nowhere.png"], "nowhere.png' cannot be read as a picture: there is no such file. Check the path"),
        (lambda folder: [folder], "cannot be read as a picture"),
    ],
)
def test_no_pictures(tmp_path, make, message):
    with pytest.raises(ValueError, match=f"images: .*{message}"):
        read(make(tmp_path))


@pytest.mark.parametrize(
    "damage", [lambda whole: b"not a picture", lambda whole: whole[: len(whole) // 2], lambda whole: whole.replace(b"IDAT", b"IDOT")]
)
def test_a_damaged_picture_is_named(tmp_path, damage):
    gradient((64, 64)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(damage((tmp_path / "good.png").read_bytes()))
    with pytest.raises(ValueError, match="bad.png' cannot be read as a picture: .* Save it anew, or leave it out.$"):
        read(tmp_path)


# Captions


def test_captions_beside_the_picture(tmp_path):
    folder = write_pictures(tmp_path / "in", 2)
    (folder / "0.txt").write_text("\ufeffa <mine> on the beach\n\n a * in the snow \na {} in {braces}\n", encoding="utf-8")
    one, other = read(folder)
    assert one.captions == ("a {} on the beach", "a {} in the snow", "a {} in {braces}") and other.captions == ("a {}",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a teddy", r"0.txt' must name the concept once in each line, as <mine>, \* or \{\}; came 'a teddy'"),
        (b"a <mine> and a <mine>", "once in each line"),
        (b" \n", "is empty; write a caption into it or remove it"),
        (b"\xff\xfe\x00", "is not text in UTF-8"),
    ],
)
def test_captions_that_do_not_work(tmp_path, text, message):
    folder = write_pictures(tmp_path / "in", 1)
    (folder / "0.txt").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read(folder)


# Masks


def test_masks_on_some_pictures_only(tmp_path):
    folder = write_pictures(tmp_path / "in", 3, mask=True)
    (folder / "1-masklabel.png").unlink()
    with pytest.raises(ValueError, match=r"some have none \(.*1.png\); give all of them one, such as 1-masklabel.png, or none.$"):
        read(folder)


def test_an_alpha_channel_on_some_pictures_only(tmp_path):
    folder = write_pictures(tmp_path / "in", 3)
    for name, alpha in (("0", 0), ("1", 255)):  # fully opaque is no mask
        image = Image.open(folder / f"{name}.png").convert("RGBA")
        image.paste((0, 0, 0, alpha), (0, 0, 4, 4))
        image.save(folder / f"{name}.png")
    with pytest.raises(ValueError, match=r"none \(.*1.png, .*2.png\); .* The mask of [^ ]*0.png is the alpha channel, .* save without"):
        read(folder)


def test_weights_of_clipseg_that_are_not_there(tmp_path):
    """Also where every picture has a mask."""
    with pytest.raises(FileNotFoundError, match="no such CLIPSeg folder: .*nowhere. Give the folder"):
        read(write_pictures(tmp_path / "in", 4, mask=True), clipseg=tmp_path / "nowhere")


@pytest.mark.parametrize(("box", "along"), [((0, 0, 8, 16), (0, 1 / 4)), ((56, 0, 64, 16), (3 / 4, 1)), ((20, 0, 36, 16), (5 / 16, 9 / 16))])
def test_the_square_lies_around_the_masks_centre(tmp_path, box, along):
    """The middle square would miss two of these, and cut the third."""
    gradient((64, 16)).save(tmp_path / "0.png")
    mask = Image.new("L", (64, 16))
    mask.paste(255, box)
    mask.save(tmp_path / "0.mask.png")
    (picture,) = read(tmp_path)
    assert corners(picture.pixels)[:2] == pytest.approx(along, abs=0.07)
    assert picture.mask.sum() == pytest.approx((box[2] - box[0]) * 16, rel=0.02)


# Shapes


def test_a_bucket_has_the_pictures_shape():
    for width, height in ((64, 64), (60, 64), (80, 60), (60, 80), (300, 100), (100, 300), (1, 900)):
        wide, high = bucket((width, height), 512, 64)
        assert wide % 64 == high % 64 == 0 and wide * high <= 512 * 512 and max(wide, high) <= 2 * min(wide, high)
        assert wide * high > 0.75 * 512 * 512
        assert abs(math.log(wide / high) - min(max(math.log(width / height), -math.log(2)), math.log(2))) < 0.19
    assert bucket((10, 10), 16, 4) == (16, 16)


def test_buckets_keep_what_a_square_would_cut_off(tmp_path):
    wide, tall = read([gradient((40, 20)), gradient((20, 40))], settings(instance_prompts="a {}", buckets=True), step=2)
    assert wide.pixels.shape == (3, 12, 20) and tall.pixels.shape == (3, 20, 12)
    assert wide.pixels[0, 5, 0] < -0.75 and wide.pixels[0, 5, -1] > 0.75 and tall.pixels[1, 0, 5] < -0.75 and tall.pixels[1, -1, 5] > 0.75


# Latents


@pytest.mark.numeric
@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
@torch.no_grad()
def test_latents_are_the_posterior_of_picture_and_mirror_image(tmp_path, make):
    pipe, pictures = make(), read(write_pictures(tmp_path / "in", 2, mask=True))
    latents = encode_pictures(pipe, pictures)
    assert latents.mean.shape == latents.std.shape == (2, 2, 4, 8, 8) and latents.mask.shape == (2, 2, 8, 8)
    for number, picture in enumerate(pictures):
        for mirrored, pixels in enumerate([picture.pixels, picture.pixels.flip(-1)]):
            for name in ("mean", "std"):

                def alone():
                    return getattr(pipe.vae.encode(pixels[None]).latent_dist, name)[0] * pipe.vae.config.scaling_factor

                assert_same_run(getattr(latents, name)[number, mirrored], as_run(alone))
        assert_close(latents.mask[number, 0], Exact(*[latents.mask[number, 1].flip(-1).double()] * 2))
    assert torch.equal(latents.mask.amax((-2, -1)), torch.ones(2, 2))


def test_a_vae_that_overflows_runs_in_float32_and_gets_its_precision_back(monkeypatch):
    pipe, seen = tiny_sdxl(dtype=torch.float16), []
    encode = type(pipe.vae).encode
    monkeypatch.setattr(
        type(pipe.vae), "encode", lambda self, x, **options: seen.append((x.dtype, self.dtype)) or encode(self, x, **options)
    )
    latents = encode_pictures(pipe, read([gradient()]))
    assert seen == [(torch.float32, torch.float32)] and pipe.vae.dtype == torch.float16 and latents.mean.dtype == torch.float32
    monkeypatch.setattr(type(pipe.vae), "encode", lambda self, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode_pictures(pipe, read([gradient()]))
    assert pipe.vae.dtype == torch.float16


def test_an_autoencoder_without_a_posterior(monkeypatch):
    from diffusers import AutoencoderTiny

    pipe = tiny_sd()
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
    )
    latents = encode_pictures(pipe, read([gradient()]))
    assert latents.std is None and latents.mean.shape == (1, 2, 4, 8, 8)
