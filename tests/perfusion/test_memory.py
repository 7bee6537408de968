"""Memory reckoned before the start, against what autograd really saves."""

import dataclasses
import re

import pytest
import torch
from typer.testing import CliRunner

from perfusion import cli, memory
from perfusion.checkpoint_file import configuration
from perfusion.memory import Parts, saved_by_backward, total, training
from perfusion.models import TOYBOX, load_pipeline
from tests.perfusion.learning import learn, write_pictures
from tests.perfusion.tiny import tiny_sd, tiny_sdxl
from tests.stand_in import save_model

REAL = {
    "sd1": Parts(859_520_964, 123_060_480, 83_653_863, 768, 12_480, 512),
    "sdxl": Parts(2_567_463_684, 123_060_480 + 694_659_840, 83_653_863, 2048, 83_200, 1024),
}


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_what_is_counted_on_shapes_is_what_a_backward_keeps(make):
    unet = make().unet
    weights, seen, kept = {p.untyped_storage().data_ptr() for p in unet.parameters()}, {}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
            kept.append(tensor)  # so that no address is used again
        return tensor

    text = torch.zeros(1, 77, unet.config.cross_attention_dim, requires_grad=True)
    added = {"text_embeds": torch.zeros(1, 12), "time_ids": torch.zeros(1, 6)} if unet.config.addition_embed_type else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unet(torch.zeros(1, 4, 8, 8), torch.tensor(5), text, added_cond_kwargs=added)
    counted = saved_by_backward(dict(unet.config), 8)
    assert counted.whole == pytest.approx(sum(seen.values()), rel=0.1) and counted.checkpointed < counted.whole


@pytest.mark.parametrize(("family", "latents", "limit"), [("sd1", 64, 6e9), ("sdxl", 128, 12e9)])
def test_low_memory_fits_the_cards_it_is_for(family, latents, limit):
    saved = saved_by_backward(configuration(family)["unet"], latents, torch.bfloat16)
    low = training(REAL[family], saved, torch.bfloat16, rows=1, checkpointing=True, low_memory=True)
    usual = training(REAL[family], saved, torch.bfloat16, rows=16, checkpointing=False, low_memory=False)
    assert total(low) < limit < total(usual)
    assert memory.table(low).endswith(f"{total(low) / 1e9:.2f} GB in all")
    # on the device in a step: no text encoder and no VAE, which a CPU has nowhere else to put
    parts = dataclasses.replace(REAL[family], size=64)
    step, on_cpu = (training(parts, saved, torch.bfloat16, rows=8, checkpointing=True, low_memory=True, device=kind) for kind in ("cuda", "cpu"))
    assert not {"text encoders", "VAE"} & set(step) and {"text encoders", "VAE"} <= set(on_cpu) and "CUDA" not in on_cpu


def test_info_says_what_a_model_is(tmp_path):
    result = CliRunner().invoke(cli.app, ["info", str(save_model(tmp_path / "model"))], prog_name="perfusion")
    assert result.exit_code == 0, result.output
    for text in ("family       a custom model, predicts epsilon", "4 cross-attention layers, 40 outputs; text width 16", "16 x 16 pixels",
                 "float32", "bfloat16", "--low-memory", "ok  perfusion train"):  # fmt: skip
        assert text in result.stdout, (text, result.stdout)


def test_info_of_the_built_in_model():
    """Small numbers are numbers: 0 M and 0.0 GB say nothing."""
    result = CliRunner().invoke(cli.app, ["info", "toybox"], prog_name="perfusion")
    assert result.exit_code == 0, result.output
    parts = re.search(r"parameters   UNet ([\d.]+) M, text encoders ([\d.]+) M, VAE ([\d.]+) M", result.stdout)
    pipe = load_pipeline("toybox", device="cpu")
    for said, part in zip(parts.groups(), (pipe.unet, pipe.text_encoder, pipe.vae)):
        assert float(said) == pytest.approx(sum(parameter.numel() for parameter in part.parameters()) / 1e6, rel=0.05)
    assert not re.search(r"(?<![\d.])0(\.0+)? (M|KB|MB|GB)\b", result.stdout), result.stdout
    weights = sum(path.stat().st_size for path in TOYBOX.rglob("*.safetensors"))
    assert f"on disk      {weights / 1e6:.1f} MB" in result.stdout


@pytest.mark.parametrize(("options", "advice"), [({}, True), ({"low_memory": True}, False)])
def test_training_says_what_it_takes_before_it_begins(tmp_path, capsys, options, advice):
    learn(tiny_sdxl(), write_pictures(tmp_path / "in"), steps=1, batch_size=1, progress=True, **options)
    said = capsys.readouterr().err
    line = re.search(r"memory: UNet [\d.]+ [KM]B, text encoders .* in all.*\.", said)
    assert line and line.start() < said.index("<mine>:") and ("--low-memory" in line[0]) == advice and "CUDA" not in line[0]
