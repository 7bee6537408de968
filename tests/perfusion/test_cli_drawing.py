"""`perfusion generate` with what users of other tools expect: sizes, schedulers, pictures to start from, grids, and files that stay."""

import itertools
import threading

import numpy
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from typer.testing import CliRunner

from perfusion import cli
from perfusion.cli.drawing import SCHEDULERS, cells
from perfusion.families import CUSTOM, family_by_id
from perfusion.files import whole_and_new
from perfusion.models import load_pipeline
from tests.stand_in import save_concept, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawing")
    save_model(folder / "model")
    save_concept(folder / "my-teddy.safetensors", "teddy", seed=1)
    Image.new("RGB", (40, 20), "red").save(folder / "start.png")
    half = Image.new("L", (40, 20))
    half.paste(255, (20, 0, 40, 20))
    half.save(folder / "half.png")
    return folder


@pytest.fixture
def draw(folder, tmp_path):
    def draw(*arguments, prompt="a <my-teddy>", code=0):
        usual = ["--model", folder / "model", "--concept", folder / "my-teddy.safetensors", "--steps", 2, "--device", "cpu"]
        arguments = ["generate", prompt, *usual, "--output", tmp_path / "out.png", "--overwrite", *arguments]
        result = CliRunner().invoke(cli.app, [str(each) for each in arguments], prog_name="perfusion")
        assert result.exit_code == code, result.output
        return Image.open(tmp_path / "out.png") if code == 0 else result.stderr

    return draw


def test_sizes(draw):
    assert draw("--width", 24, "--height", 16).size == (24, 16)
    assert "--width must be a multiple of 2, the side of one latent, got 17" in draw("--width", 17, code=2)


def test_every_scheduler(folder):
    config = load_pipeline(folder / "model", device="cpu").scheduler.config
    import diffusers

    for name, (cls, options) in SCHEDULERS.items():
        getattr(diffusers, cls).from_config(config, **options).set_timesteps(4), name


def test_another_scheduler_draws_another_picture(draw):
    assert draw("--scheduler", "euler-a").tobytes() != draw().tobytes()
    assert "--scheduler must be one of ddim, ddpm, " in draw("--scheduler", "magic", code=2)


def test_pictures_to_start_from(draw, folder):
    assert draw("--init-image", folder / "start.png").size == (20, 12)  # its own shape, in the model's size
    redrawn = draw("--init-image", folder / "start.png", "--mask-image", folder / "half.png", "--width", 16, "--height", 16)
    assert redrawn.size == (16, 16)
    assert "give the picture with --init-image" in draw("--mask-image", folder / "half.png", code=2)
    (folder / "torn.png").write_bytes(b"no")
    assert "--init-image: " in (told := draw("--init-image", folder / "torn.png", code=2)) and "cannot be read as a picture" in told


def test_a_control_image(draw, folder):
    unet = load_pipeline(folder / "model", device="cpu").unet
    ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)).save_pretrained(folder / "controlnet")
    assert "--controlnet is missing" in draw("--control-image", folder / "start.png", code=2)
    assert draw("--control-image", folder / "start.png", "--controlnet", folder / "controlnet").size == (16, 16)


def test_a_grid_is_prompts_by_settings(draw, tmp_path):
    sheet = draw("--grid", "bias=0.2,0.9", "--grid", "steps=1,2", "--seed", 3)
    files = [tmp_path / f"out-{number}.png" for number in range(1, 5)]
    pictures = [Image.open(file) for file in files]
    assert sheet.width > 3 * sheet.height and len({picture.tobytes() for picture in pictures}) == 4
    import json

    facts = [json.loads(picture.text["perfusion"]) for picture in pictures]
    assert [(each["concepts"]["my-teddy"]["bias"], each["steps"]) for each in facts] == list(itertools.product((0.2, 0.9), (1, 2)))
    alone = draw("--bias", 0.2, "--steps", 1, "--seed", 3)
    assert alone.tobytes() == pictures[0].tobytes()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("colour=1", "settings are steps, guidance_scale, strength, bias, temperature, and NAME.bias"),
        ("bias=x", "its values must be numbers with commas between them"),
        ("steps=0", "it needs values, as in steps=1,2, all positive"),
        ("strength=9", "strength must be a number between 0 and 4"),
        ("other.bias=1", "no concept named 'other' is loaded"),
    ],
)
def test_grids_that_cannot_be(draw, grid, message):
    assert message in draw("--grid", grid, code=2)


def test_equal_values_share_nothing():
    assert [cell.steps for cell in cells(["steps=3,3"], steps=1, guidance_scale=1)] == [3, 3]


def test_two_programs_that_write_one_name_replace_nothing(tmp_path):
    taken, start = [], threading.Barrier(8)

    def write(number):
        start.wait()
        with whole_and_new(tmp_path / "a.png") as (draft, name):
            draft.write_text(str(number))
        taken.append((name(), number))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert sorted(path.name for path, _ in taken) == sorted(["a.png", *(f"a-{n}.png" for n in range(2, 9))])
    assert all(path.read_text() == str(number) for path, number in taken) and len(list(tmp_path.iterdir())) == 8


def test_steps_and_guidance_suit_the_model_where_nothing_is_said():
    def said(family, **given):
        return [(cell.steps, cell.guidance_scale) for cell in (each.of(family) for each in cells(None, **given))]

    assert said(family_by_id("toybox"), steps=None, guidance_scale=None) == [(25, 2.5)]
    assert said(CUSTOM, steps=None, guidance_scale=None) == [(50, 6.0)]
    assert said(family_by_id("toybox"), steps=9, guidance_scale=1.0) == [(9, 1.0)]
    assert [(each.of(CUSTOM).steps, each.of(CUSTOM).guidance_scale) for each in cells(["steps=3,5"], steps=None, guidance_scale=None)] == [
        (3, 6.0), (5, 6.0)
    ]


@pytest.mark.parametrize("scheduler", ["ddim", "euler-a", "heun"])
def test_a_part_drawn_anew_with_latents_of_eight_channels(tmp_path, scheduler):
    """Toybox's, which diffusers' inpainting refuses: the black part stays as the autoencoder has it, the white one is drawn."""
    pipe = load_pipeline("toybox", device="cpu")
    start = pipe("a teapot", num_inference_steps=4, generator=torch.Generator().manual_seed(3)).images[0]
    start.save(tmp_path / "start.png")
    Image.fromarray(numpy.repeat([[255] * 64 + [0] * 64], 128, 0).astype(numpy.uint8)).save(tmp_path / "left.png")
    Image.new("L", (128, 128)).save(tmp_path / "black.png")

    def draw(mask, code=0):
        words = ["generate", "a teddy", "--model", "toybox", "--steps", 5, "--scheduler", scheduler, "--device", "cpu", "--overwrite",
                 "--init-image", tmp_path / "start.png", "--mask-image", tmp_path / mask, "--output", tmp_path / "x.png"]  # fmt: skip
        result = CliRunner().invoke(cli.app, list(map(str, words)), prog_name="perfusion")
        assert result.exit_code == code, result.output
        return result.stderr

    draw("left.png")
    with Image.open(tmp_path / "x.png") as drawn:
        change = abs(numpy.asarray(drawn.convert("RGB"), float) - numpy.asarray(start, float))
    assert change[:, 72:].mean() < 8 < 2 * 8 < change[:, :56].mean()
    assert "is black everywhere, so nothing would be drawn anew" in draw("black.png", code=2)
