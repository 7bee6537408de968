"""One .safetensors file, as model sites give it: every family, in its real layout and key names, and what else may be in such a file."""

import socket

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from perfusion.base import describe_base
from perfusion.checkpoint_file import Kind, read_kind
from perfusion.models import ModelError, load_pipeline
from tests.kernels.tolerance import as_run, assert_same_run
from tests.perfusion.editing import draw
from tests.perfusion.original_layout import original_layout, pipeline_of, use_small_families

pytestmark = pytest.mark.pipelines

KINDS = [
    Kind("sd1", 4, "epsilon", True), Kind("sd1", 9, "epsilon", True), Kind("sd2", 4, "v_prediction", True),
    Kind("sd2", 9, "epsilon", True), Kind("sdxl", 4, "epsilon", True), Kind("sdxl", 9, "epsilon", True),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _small_and_offline(monkeypatch):
    use_small_families(monkeypatch)

    def refuse(*_):
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """kind -> the pipeline, and its file; each written once."""
    made = {}

    def file_of(kind, **options):
        key = (kind, *options)
        if key not in made:
            pipe = pipeline_of(kind)
            path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
            save_file(original_layout(pipe, kind.family, **options), path)
            made[key] = pipe, path
        return made[key]

    return file_of


def weights_of(pipe):
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items() if "position_ids" not in key}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.family}-{kind.channels}")
def test_every_weight_arrives_and_nothing_is_downloaded(files, kind):
    made, path = files(kind)
    assert read_kind(path) == kind
    pipe = load_pipeline(path, device="cpu")
    assert type(pipe).__name__ == kind.pipeline and pipe.scheduler.config.prediction_type == kind.prediction_type
    expected, found = weights_of(made), weights_of(pipe)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
    assert describe_base(pipe) == describe_base(made)
    assert pipe.tokenizer.pad_token == made.tokenizer.pad_token and len(pipe.tokenizer) == 49408


@pytest.mark.numeric
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.inpainting], ids=lambda kind: kind.family)
def test_what_is_loaded_draws_what_was_saved(files, kind):
    made, path = files(kind)
    options = dict(prompt="a photo of a cat", height=64, width=64)
    assert_same_run(draw(load_pipeline(path, device="cpu"), **options), as_run(lambda: draw(made, **options)))


def test_a_half_precision_file_and_ema_weights_beside(files, tmp_path):
    made, path = files(KINDS[0])
    tensors = {name: value.half() if value.is_floating_point() else value for name, value in original_layout(made, "sd1").items()}
    tensors |= {f"model_ema.{name.replace('.', '')}": value.clone() + 1 for name, value in tensors.items() if "input_blocks.1" in name}
    save_file(tensors, tmp_path / "half.safetensors")
    pipe = load_pipeline(tmp_path / "half.safetensors", device="cpu")
    assert pipe.dtype == torch.float32
    for name, value in weights_of(made).items():
        assert torch.equal(weights_of(pipe)[name], value.half().float()), name


@pytest.mark.parametrize("given", ["original", "diffusers", "folder"])
def test_the_vae_is_given_where_none_is_baked_in(files, tmp_path, given):
    made, path = files(KINDS[0], vae=False)
    with pytest.raises(ModelError, match=r"has no VAE baked in. Give one with --vae \(vae=\)"):
        load_pipeline(path, device="cpu")
    other = pipeline_of(KINDS[0], seed=5).vae
    if given == "folder":
        other.save_pretrained(vae := tmp_path / "vae")
    else:
        layout = original_layout(pipeline_of(KINDS[0], seed=5), "sd1")
        mine = {name.removeprefix("first_stage_model."): value for name, value in layout.items() if name.startswith("first_stage_model.")}
        save_file(mine if given == "original" else other.state_dict(), vae := tmp_path / "vae.safetensors")
    pipe = load_pipeline(path, device="cpu", vae=vae)
    assert all(torch.equal(value, pipe.vae.state_dict()[name]) for name, value in other.state_dict().items())


def test_what_a_file_predicts(files, tmp_path):
    _, path = files(KINDS[2])
    assert read_kind(path, "epsilon").prediction_type == "epsilon"
    assert load_pipeline(path, device="cpu", prediction_type="epsilon").scheduler.config.prediction_type == "epsilon"
    tensors = original_layout(pipeline_of(KINDS[4]), "sdxl") | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(tensors, tmp_path / "v.safetensors")
    scheduler = load_pipeline(tmp_path / "v.safetensors", device="cpu").scheduler.config
    assert (scheduler.prediction_type, scheduler.rescale_betas_zero_snr) == ("v_prediction", True)
    save_file(original_layout(pipeline_of(KINDS[2]), "sd2"), tmp_path / "e.safetensors", {"modelspec.prediction_type": "epsilon"})
    assert read_kind(tmp_path / "e.safetensors").prediction_type == "epsilon"
    with pytest.raises(ModelError, match="prediction_type must be one of epsilon, v_prediction, got 'x0'"):
        load_pipeline(path, device="cpu", prediction_type="x0")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (1,)}, "is a LoRA, not a model: give it with --lora"),
        ({"unet.up_blocks.0.attn2.to_k.lora_A.weight": (1,)}, "is a LoRA"),
        ({"emb_params": (2, 24)}, "is a textual inversion, not a model: give it with --embedding"),
        ({"clip_l": (2, 24), "clip_g": (2, 32)}, "is a textual inversion"),
        ({"control_model.time_embed.0.weight": (1,)}, "is a ControlNet"),
        ({"double_blocks.0.img_attn.qkv.weight": (1,)}, "joint attention .as SD3 and Flux do., which cannot be edited"),
        ({"decoder.conv_in.weight": (1,), "encoder.conv_in.weight": (1,)}, "is a VAE, not a model: give it with --vae"),
        ({"down_blocks.0.resnets.0.conv1.weight": (1,)}, "one part of a model in diffusers' format: give the folder"),
        ({"x": (1,)}, "is not a checkpoint of Stable Diffusion 1.x, 2.x or XL"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (32, 4, 3, 3)}, "is of a family that is not known"),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": (32, 4, 3, 3), "conditioner.embedders.0.model.positional_embedding": (77, 32)},
            "is the refiner of Stable Diffusion XL",
        ),
        (
            {
                "model.diffusion_model.input_blocks.0.0.weight": (32, 4, 3, 3),
                "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (32, 24),
            },
            "without its text encoder .no cond_stage_model.*take the full checkpoint",
        ),
    ],
    ids=lambda value: next(iter(value))[:30] if isinstance(value, dict) else "",
)
def test_other_files_are_told_for_what_they_are(tmp_path, names, message):
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=message):
        load_pipeline(tmp_path / "x.safetensors", device="cpu")


def test_files_that_cannot_be_read(tmp_path, files):
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="is a pickle, which can hold code and is not read. Take the .safetensors"):
        load_pipeline(tmp_path / "x.ckpt", device="cpu")
    _, path = files(KINDS[0])
    (tmp_path / "torn.safetensors").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot be read as a .safetensors file: .* Is the download complete"):
        load_pipeline(tmp_path / "torn.safetensors", device="cpu")


def test_a_file_with_missing_weights_is_refused(files, tmp_path):
    made, _ = files(KINDS[0])
    tensors = original_layout(made, "sd1")
    del tensors["model.diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_v.weight"]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="(could not be loaded|incomplete)"):
        load_pipeline(tmp_path / "x.safetensors", device="cpu")


# The real sizes


@pytest.mark.parametrize(
    ("family", "unet", "texts", "outputs"),
    [("sd1", 859_520_964, [123_060_480], 12_480), ("sd2", 865_910_724, [340_387_840], 12_480), ("sdxl", 2_567_463_684, [123_060_480, 694_659_840], 83_200)],
)
def test_the_shipped_configurations_are_those_of_the_published_models(monkeypatch, family, unet, texts, outputs):
    """By their numbers of parameters, and of cross-attention outputs, without any memory for them."""
    monkeypatch.undo()
    pipe = pipeline_of(Kind(family, 4, "epsilon", True), device="meta")

    def count(model):
        return sum(parameter.numel() for parameter in model.parameters())

    assert count(pipe.unet) == unet and count(pipe.vae) == 83_653_863
    assert [count(getattr(pipe, name)) for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)] == texts
    widths = [module.out_features for name, module in pipe.unet.named_modules() if name.endswith("attn2.to_v")]
    assert sum(widths) == outputs and {module.in_features for name, module in pipe.unet.named_modules() if name.endswith("attn2.to_k")} == {
        {"sd1": 768, "sd2": 1024, "sdxl": 2048}[family]
    }
