"""`perfusion warmup`: the shapes it sees, what it prints, and its exit codes."""

import json

import pytest
import torch
from typer.testing import CliRunner

import perfusion_kernels
from perfusion import cli, models
from perfusion.base import cross_attention_layers
from perfusion.cli import warmup
from tests.perfusion.tiny import tiny_sd

CHOSEN = {"a GPU": {"edited_attention 2 64": {"BLOCK_N": 64, "num_warps": 4}}}


def run(*arguments):
    return CliRunner().invoke(cli.app, ["warmup", *arguments], prog_name="perfusion")


@pytest.fixture
def warmed(monkeypatch):
    """A tiny model, as if a GPU were there; what the operators' package was asked to warm up."""
    asked = {}

    def warm_up(**options):
        asked.update(options)
        return CHOSEN

    monkeypatch.setattr(warmup, "_best_device", lambda: "cuda")
    monkeypatch.setattr(models, "load_pipeline", lambda model, device: tiny_sd())
    monkeypatch.setattr(perfusion_kernels, "warm_up", warm_up)
    return asked


@pytest.mark.parametrize("arguments", ((), ("--device", "cpu")))
def test_without_a_gpu_it_says_so(arguments, monkeypatch):
    monkeypatch.setattr(warmup, "_best_device", lambda: None)
    result = run(*arguments)
    assert result.exit_code == warmup.NO_GPU == 4
    assert result.stderr == "error: there is no GPU to compile kernels for; without one, nothing needs to warm up\n"


def test_shapes_are_those_of_the_model():
    pipe = tiny_sd()
    layers = cross_attention_layers(pipe.unet).values()
    for batch, factor in ((1, 1), (3, 2)):
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor * factor
        shapes = warmup.layer_shapes(pipe, batch, size, size)
        assert shapes["rows"] == 2 * batch and shapes["dtype"] == torch.float32
        assert shapes["text_width"] == pipe.unet.config.cross_attention_dim
        assert shapes["tokens"] == pipe.tokenizer.model_max_length
        expected = sorted((layer.to_q.in_features, layer.to_q.out_features, layer.heads) for layer in layers)
        assert sorted((C, H * d, H) for _, C, H, d in shapes["layers"]) == expected
        assert max(N for N, *_ in shapes["layers"]) == (pipe.unet.config.sample_size * factor) ** 2
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_what_it_asks_for_and_prints(warmed):
    result = run("--batch", "2", "--concepts", "3", "--training")
    assert result.exit_code == 0, result.output
    assert (warmed["rows"], warmed["concepts"], warmed["gradients"], warmed["device"]) == (4, 3, True, "cuda")
    first, last = result.stdout.splitlines()
    assert first == "edited_attention 2 64: BLOCK_N 64, num_warps 4"
    assert last.startswith(f"1 launches for {len(warmed['layers'])} layers of toybox, 4 rows, on a GPU; ")


def test_json(warmed):
    facts = json.loads(run("--json").stdout)
    assert facts["chosen"] == CHOSEN and facts["rows"] == 2 and facts["model"] == "toybox"


@pytest.mark.parametrize(
    ("device", "code", "message"),
    [
        ("nonsense", 2, "error: --device nonsense cannot be used: "),
        ("mps", 2, "error: --device must be cuda or xpu, which have kernels to compile, got mps\n"),
        ("xpu:x", 2, "error: --device xpu:x cannot be used: "),
        ("xpu", 4, "error: there is no GPU to compile kernels for; "),
        ("cuda:99", 2 if torch.cuda.is_available() else 4, "error: "),
    ],
)
def test_the_device_is_checked(device, code, message):
    result = run("--device", device)
    assert (result.exit_code, result.stderr.startswith(message), result.stderr.count("\n")) == (code, True, 1), result.output
