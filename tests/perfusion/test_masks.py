"""Where a training image's mask comes from, and what the masked loss computes."""

from __future__ import annotations

import numpy
import pytest
import torch
from PIL import Image
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor, ViTImageProcessor

from perfusion.masks import ClipSeg, flatten, latent_mask, load_mask, masked_loss, masked_stem
from tests.kernels.tolerance import as_run, assert_close, assert_same_run, exactly
from tests.perfusion.tiny import tiny_tokenizer

WIDTH, HEIGHT = 12, 8


def picture(mode: str = "RGB", colour=None) -> Image.Image:
    return Image.new(mode, (WIDTH, HEIGHT), colour or (200, 40, 40, 255)[: len(mode)])


def grey(values: numpy.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(numpy.uint8))


def left_half(value: int = 255) -> numpy.ndarray:
    values = numpy.zeros((HEIGHT, WIDTH))
    values[:, : WIDTH // 2] = value
    return values


# ---- sidecar files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["-masklabel.png", ".mask.png", "-MaskLabel.PNG", "_mask.webp", "-mask.tif"])
def test_sidecar(tmp_path, ending):
    grey(left_half(51)).save(tmp_path / f"teddy.v2{ending}", **({"lossless": True} if "webp" in ending else {}))
    mask = load_mask(tmp_path / "teddy.v2.jpg", picture())
    assert mask.dtype == torch.float32 and mask.shape == (HEIGHT, WIDTH)
    torch.testing.assert_close(mask, torch.from_numpy(left_half(1)).float() * 0.2)
    assert masked_stem(tmp_path / f"teddy.v2{ending}") == "teddy.v2" and masked_stem(tmp_path / "teddy.v2.jpg") is None


def test_a_sidecar_wins_over_alpha_and_masklabel_over_mask(tmp_path):
    image = picture("RGBA", (1, 2, 3, 100))
    grey(left_half()).save(tmp_path / "a.mask.png")
    assert load_mask(tmp_path / "a.png", image).unique().tolist() == [0, 1]
    grey(left_half() * 0 + 255).save(tmp_path / "a-masklabel.png")
    assert load_mask(tmp_path / "a.png", image).unique().tolist() == [1]


@pytest.mark.parametrize("shape", ["white", "black", "grey and alpha"])
def test_a_mask_may_be_a_shape_on_a_transparent_ground(tmp_path, shape):
    """Whatever colour it is drawn in; converting it to grey would make it white, or black, everywhere."""
    image = Image.new("LA", (WIDTH, HEIGHT), (0 if shape == "black" else 255, 0))
    image.putalpha(grey(left_half()))
    if shape == "grey and alpha":
        image.putpixel((0, 0), (51, 255))
    image.save(tmp_path / "a_mask.png")
    expected = torch.from_numpy(left_half(1)).float()
    if shape == "grey and alpha":
        expected[0, 0] = 0.2
    torch.testing.assert_close(load_mask(tmp_path / "a.png", picture()), expected)


def test_a_sixteen_bit_sidecar_keeps_its_scale(tmp_path):
    Image.fromarray((left_half(1) * 13107).astype(numpy.uint16)).save(tmp_path / "a.mask.png")
    assert load_mask(tmp_path / "a.png", picture()).max() == pytest.approx(0.2)


def test_sidecars_that_cannot_be_used(tmp_path):
    sidecar, path = tmp_path / "a.mask.png", tmp_path / "a.png"
    grey(left_half().T).save(sidecar)
    with pytest.raises(ValueError, match=r"a\.mask\.png is 8 x 12 pixels, its image .*a\.png is 12 x 8"):
        load_mask(path, picture())
    grey(left_half() * 0).save(sidecar)
    with pytest.raises(ValueError, match=r"a\.mask\.png is black everywhere"):
        load_mask(path, picture())
    sidecar.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"a\.mask\.png cannot be read as a picture"):
        load_mask(path, picture())
    grey(numpy.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH))).save(sidecar)
    sidecar.write_bytes(sidecar.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"a\.mask\.png cannot be read as a picture"):
        load_mask(path, picture())


# ---- alpha ----------------------------------------------------------------------------------------------------------------


def cut_out() -> Image.Image:
    image = picture("RGBA")
    image.putalpha(grey(left_half(204)))
    return image


def test_alpha():
    torch.testing.assert_close(load_mask("a.png", cut_out()), torch.from_numpy(left_half(1)).float() * 0.8)


def test_opaque_alpha_is_no_mask():
    assert load_mask("a.png", picture("RGBA")) is None
    assert load_mask("a.png", picture()) is None


def test_transparent_everywhere_is_refused():
    with pytest.raises(ValueError, match=r"a\.png is transparent everywhere"):
        load_mask("a.png", picture("RGBA", (1, 2, 3, 0)))


def test_palette_transparency_counts(tmp_path):
    image = grey(left_half()).convert("P")
    image.save(tmp_path / "a.png", transparency=0)
    image = Image.open(tmp_path / "a.png")
    assert image.mode == "P"
    assert load_mask(tmp_path / "a.png", image).sum() == HEIGHT * WIDTH / 2


def test_flatten_shows_white_behind_transparency():
    """80 % of the red of `picture` over white; and what a fully transparent pixel stores is not seen."""
    pixels = numpy.asarray(flatten(cut_out())).astype(int)
    assert numpy.abs(pixels[0, 0] - [211, 83, 83]).max() <= 1 and pixels[0, -1].tolist() == [255, 255, 255]
    assert flatten(picture()).getpixel((0, 0)) == (200, 40, 40)


# ---- CLIPSeg --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clipseg_folder(tmp_path_factory):
    """A CLIPSeg of random weights in the folder format of the real one: 32 x 32 pixels, two layers."""
    folder, tokenizer = tmp_path_factory.mktemp("clipseg"), tiny_tokenizer()
    layers = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=16)
    config = CLIPSegConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **layers,
        ),
        vision_config=dict(image_size=32, patch_size=8, **layers),
        projection_dim=8,
        reduce_dim=4,
        extract_layers=[0, 1],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPSegForImageSegmentation(config)
        torch.nn.init.normal_(model.decoder.transposed_convolution.weight, std=0.5)
    model.save_pretrained(folder)
    CLIPSegProcessor(ViTImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def noise_picture() -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=numpy.uint8))


@pytest.mark.numeric
def test_clipseg(clipseg_folder):
    """Equals the model called by hand: sigmoid of the logits, resized to the image; depends on picture and word."""
    image = noise_picture()
    mask = load_mask("a.png", image, clipseg=clipseg_folder, superclass="teddy")
    assert mask.shape == (HEIGHT, WIDTH) and mask.dtype == torch.float32 and 0 < mask.min() < mask.max() < 1

    model = CLIPSegForImageSegmentation.from_pretrained(clipseg_folder).eval()
    inputs = CLIPSegProcessor.from_pretrained(clipseg_folder)(text=["teddy"], images=[image], return_tensors="pt")

    def by_hand():
        logits = model(**inputs).logits.reshape(1, 1, 32, 32)
        return torch.nn.functional.interpolate(logits.sigmoid(), (HEIGHT, WIDTH), mode="bilinear")[0, 0]

    with torch.no_grad():
        assert_same_run(mask, as_run(by_hand))

    ready = ClipSeg(clipseg_folder)
    assert torch.equal(load_mask("a.png", image, clipseg=ready, superclass="teddy"), mask)
    assert not torch.equal(load_mask("a.png", image, clipseg=ready, superclass="teapot"), mask)
    assert not torch.equal(load_mask("a.png", picture(), clipseg=ready, superclass="teddy"), mask)


def test_clipseg_comes_last(clipseg_folder, tmp_path):
    assert load_mask("a.png", cut_out(), clipseg=clipseg_folder, superclass="teddy").max() == pytest.approx(0.8)
    grey(left_half(51)).save(tmp_path / "a.mask.png")
    mask = load_mask(tmp_path / "a.png", picture(), clipseg=clipseg_folder, superclass="teddy")
    assert mask.max() == pytest.approx(0.2)


def test_clipseg_that_sees_nothing_is_refused(clipseg_folder):
    blind = ClipSeg(clipseg_folder)
    blind.model.decoder.transposed_convolution.bias.data.fill_(-50)
    with pytest.raises(ValueError, match=r"CLIPSeg sees no 'teddy' in a\.png.*0\.000.*a-masklabel\.png"):
        load_mask("a.png", noise_picture(), clipseg=blind, superclass="teddy")


def test_clipseg_needs_a_folder_and_a_word(clipseg_folder, tmp_path):
    with pytest.raises(ValueError, match="needs the superclass"):
        load_mask("a.png", picture(), clipseg=clipseg_folder)
    with pytest.raises(FileNotFoundError, match="no such CLIPSeg folder"):
        load_mask("a.png", picture(), clipseg=tmp_path / "nowhere", superclass="teddy")
    with pytest.raises(ValueError, match="does not hold a CLIPSeg model"):
        load_mask("a.png", picture(), clipseg=tmp_path, superclass="teddy")


# ---- latents and loss -------------------------------------------------------------------------------------------------------


def test_latent_mask_averages_areas_and_keeps_the_proportions_of_rows():
    """A mask normalised row by row would lift the faint upper half to 1; one normalised per batch would not lift the second."""
    mask = torch.zeros(2, 8, 12)
    mask[0, :4, :6], mask[0, 4:, :6] = 0.2, 0.8
    mask[1, 0, 0] = 0.5
    small = latent_mask(mask, (2, 3))
    torch.testing.assert_close(small[0], torch.tensor([[0.25, 0.125, 0.0], [1.0, 0.5, 0.0]]))
    torch.testing.assert_close(small[1], torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(latent_mask(mask[0], (2, 3)), small[0])


def test_latent_mask_of_a_size_that_does_not_divide():
    small = latent_mask(torch.rand(65, 47, generator=torch.Generator().manual_seed(0)), (8, 6))
    assert small.shape == (8, 6) and small.max() == 1 and small.min() > 0


def test_latent_mask_refuses(tmp_path):
    with pytest.raises(ValueError, match="zero everywhere"):
        latent_mask(torch.zeros(8, 8), (2, 2))
    with pytest.raises(ValueError, match="floating point"):
        latent_mask(torch.ones(8, 8, dtype=torch.uint8), (2, 2))


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 4, 5, generator=generator, dtype=torch.float64).unbind(0)
    return prediction.to(dtype), target.to(dtype), torch.rand(3, 4, 5, generator=generator, dtype=torch.float64)


@pytest.mark.numeric
def test_masked_loss_equals_a_loop():
    prediction, target, mask = case()

    def loop(b):
        weighted = sum(
            mask[b, y, x] * (prediction[b, c, y, x] - target[b, c, y, x]) ** 2 for c in range(4) for y in range(4) for x in range(5)
        )
        return weighted / (4 * mask[b].sum())

    for b, loss in enumerate(masked_loss(prediction, target, mask)):
        assert_close(loss, *exactly(loop, b))


@pytest.mark.numeric
def test_masked_loss_without_mask_is_the_plain_mean():
    prediction, target, mask = case()
    (plain,) = exactly(lambda: (prediction - target).square().mean((1, 2, 3)))
    for ones in (None, torch.ones_like(mask), 0.3 * torch.ones_like(mask)[:, None]):
        assert_close(masked_loss(prediction, target, ones), plain)


def test_masked_loss_is_linear_in_the_mask():
    """Fails for a mask that multiplies prediction and target, which is its square: err² m², not err² m."""
    prediction, target = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    prediction[..., 1] = 3
    mask = torch.tensor([[[1.0, 0.5]]])
    assert masked_loss(prediction, target, mask).item() == pytest.approx((1 + 0.5 * 9) / 1.5)
    squared = ((mask * prediction - mask * target) ** 2).sum() / (mask**2).sum()
    assert squared.item() != pytest.approx((1 + 0.5 * 9) / 1.5, abs=0.1)


def test_a_small_subject_counts_as_much_as_a_large_one():
    prediction, target = torch.full((2, 4, 4, 4), 2.0), torch.zeros(2, 4, 4, 4)
    mask = torch.zeros(2, 4, 4)
    mask[0, 0, 0], mask[1] = 1, 1
    assert masked_loss(prediction, target, mask).tolist() == [4, 4]


def test_nothing_outside_the_mask_gets_a_gradient():
    prediction, target, mask = case()
    mask[:, :2] = 0
    prediction.requires_grad_()
    masked_loss(prediction, target, mask).sum().backward()
    assert not prediction.grad[:, :, :2].any() and prediction.grad[:, :, 2:].all()


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masked_loss_is_float32_inside(dtype):
    """Half precision cannot hold these errors' squares."""
    prediction, target, mask = case(dtype)
    loss = masked_loss(1000 * prediction, 1000 * target, mask)
    assert loss.dtype == torch.float32
    assert_close(loss, *exactly(masked_loss, (1000 * prediction).double(), (1000 * target).double(), mask.double()))


@pytest.mark.parametrize("shape", [(3, 4), (1, 4, 5), (3, 1, 5), (3, 4, 4, 5), (4, 5)])
def test_masked_loss_refuses_masks_that_would_broadcast(shape):
    prediction, target, _ = case()
    with pytest.raises(ValueError, match=r"mask must be \[3, 4, 5\] or \[3, 1, 4, 5\]"):
        masked_loss(prediction, target, torch.ones(shape))


def test_masked_loss_refuses_a_target_that_would_broadcast():
    prediction, target, mask = case()
    with pytest.raises(ValueError, match="prediction and target must both be"):
        masked_loss(prediction, target[:1], mask)
