"""Text encoders in 8 bits: known again, trained and drawn with; layers without gradients are refused; what their weights take.

A stand-in keeps integers as bitsandbytes does. The real libraries are tested where they are installed.
"""

import importlib
import sys
import warnings

import pytest
import torch
from typer.testing import CliRunner

from perfusion import cli, memory
from perfusion.base import UnsupportedPipeline, describe_base, fingerprints_match
from perfusion.base.dense import dense_weight, embedding_rows, is_quantised, quantised_layers, transposes, weight_bytes
from perfusion.convert.fitting import projection_weights
from perfusion.handle import attach
from perfusion.models import ModelError, load_pipeline
from perfusion.other_formats import embedding_tensors, lora_tensors
from tests.perfusion.editing import draw
from tests.perfusion.learning import covariance_of, learn, train_module, write_pictures
from tests.perfusion.tiny import tiny_sd, tiny_sdxl
from tests.stand_in import save_concept, save_model

pytestmark = pytest.mark.filterwarnings("ignore:.*few. a concept takes", "ignore::UserWarning:bitsandbytes", "ignore::FutureWarning")


class Eight(torch.nn.Module):
    """A linear layer of one byte a weight and a scale a row."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = torch.nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, (self.weight * self.scale).to(x.dtype), self.bias)


class Forward(Eight):
    """The same for inference alone."""

    def forward(self, x):
        return super().forward(x.detach())


def exchange(model, kind):
    """Put `kind(layer)` in place of every linear layer."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, kind(child))


def by_torchao(model):
    library = pytest.importorskip("torchao.quantization")
    library.quantize_(model, library.Int8WeightOnlyConfig())


def by_quanto(model):
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model, weights=library.qint8)
    library.freeze(model)


def by_bitsandbytes(model):
    layers = pytest.importorskip("bitsandbytes").nn

    def eight(linear):
        made = layers.Linear8bitLt(linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False)
        made.load_state_dict(linear.state_dict())
        return made.to("cpu")

    exchange(model, eight)


QUANTISE = {"stand-in": lambda model: exchange(model, Eight), "torchao": by_torchao, "quanto": by_quanto, "bitsandbytes": by_bitsandbytes}


@pytest.fixture(params=QUANTISE)
def quantise(request):
    return QUANTISE[request.param]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("quantised") / "pictures")


def uneven(model):
    """Rows as unlike in size as trained ones are: integers without their scales are another matrix."""
    with torch.no_grad():
        for layer in model.modules():
            if type(layer) is torch.nn.Linear:
                layer.weight *= torch.logspace(-1.5, 0.5, layer.out_features)[:, None]


def test_a_layer_is_read_by_calling_it(quantise):
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Linear(48, 16, bias=False))
    uneven(model)
    before = [layer.weight.detach().clone() for layer in model]
    quantise(model)
    assert list(quantised_layers(model)) == ["0", "1"]
    for layer, weight in zip(model, before):
        row = weight.abs().amax(1, keepdim=True)
        assert ((dense_weight(layer).float() - weight) / row).abs().max() < 0.02  # half a step of 1/127, and LLM.int8()'s of the input
        assert torch.equal(dense_weight(layer, 8, 4), dense_weight(layer)[:8, :4]) and transposes(layer)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("low_memory", [False, True])
def test_an_encoder_in_8_bits_learns_and_draws(make, quantise, low_memory, pictures):
    """The concept is near the one that unquantised encoders learn, each pipeline draws with either, and both write the same LoRA."""
    plain, eight = make(), make()
    encoders = [eight.text_encoder, getattr(eight, "text_encoder_2", None)]
    for encoder in filter(None, encoders):
        quantise(encoder)
    assert fingerprints_match(describe_base(plain).text_encoder, describe_base(eight).text_encoder)
    covariance = covariance_of(plain)  # fits both
    one, other = (learn(pipe, pictures, covariance=covariance, low_memory=low_memory) for pipe in (plain, eight))
    moved = (one.word_embeddings[0] - embedding_rows(plain.text_encoder.get_input_embeddings(), ids(plain))[0]).norm()
    assert moved > 0 and (one.word_embeddings[0] - other.word_embeddings[0]).norm() < 0.5 * moved
    assert torch.nn.functional.cosine_similarity(one.value_outputs, other.value_outputs, 0) > 0.99
    assert all(torch.allclose(a, b, atol=0.05) for a, b in zip(embedding_tensors(one, plain), embedding_tensors(one, eight), strict=True))
    superclass = draw(eight, "a teddy")
    for pipe in (plain, eight):
        with attach(pipe) as handle:
            handle.load(other)
            assert (draw(pipe, "a <mine>") != superclass).any()


def ids(pipe):
    return pipe.tokenizer("teddy", add_special_tokens=False).input_ids


def test_a_unet_in_8_bits_learns_and_converts(quantise, pictures):
    plain, eight = tiny_sd(), tiny_sd()
    quantise(eight.unet)
    one, other = (learn(pipe, pictures, covariance=covariance_of(plain)) for pipe in (plain, eight))
    assert torch.nn.functional.cosine_similarity(one.value_outputs, other.value_outputs, 0) > 0.99
    for kind in ("to_k", "to_v"):
        for a, b in zip(projection_weights(plain, kind), projection_weights(eight, kind), strict=True):
            assert torch.nn.functional.cosine_similarity(a.flatten(), b.float().flatten(), 0) > 0.999
    made = lora_tensors(one, plain, 1.0), lora_tensors(one, eight, 1.0)
    for name, (_, up) in made[0].items():
        assert torch.nn.functional.cosine_similarity(up.flatten(), made[1][name][1].flatten(), 0) > 0.99, name


def test_layers_without_gradients_are_refused(pictures):
    pipe = tiny_sd()
    exchange(pipe.text_encoder, Forward)
    with pytest.raises(UnsupportedPipeline, match=r"mlp.fc2 of the CLIPTextModel is a .*Forward, which computes no gradients.*unquantised"):
        learn(pipe, pictures, covariance=covariance_of(tiny_sd()))
    with attach(pipe):
        assert draw(pipe, "a teddy") is not None  # it draws


def test_torch_dynamic_quantisation_is_refused(pictures):
    quantization = importlib.import_module("torch.ao.quantization")
    pipe = tiny_sd()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.text_encoder = quantization.quantize_dynamic(pipe.text_encoder, {torch.nn.Linear})
    assert fingerprints_match(describe_base(pipe).text_encoder, describe_base(tiny_sd()).text_encoder)
    with pytest.raises(UnsupportedPipeline, match="which computes no gradients"):
        learn(pipe, pictures, covariance=covariance_of(tiny_sd()))


def test_layers_that_cannot_compute_are_named():
    class Broken(Eight):
        def forward(self, x):
            raise AssertionError("N must be divisible by block_n")

    pipe = tiny_sd()
    exchange(pipe.text_encoder, Broken)
    with pytest.raises(UnsupportedPipeline, match=r"quantised weights of CLIPTextModel \(.*Broken\) cannot be computed with here: .*block_n"):
        describe_base(pipe)


def test_memory_is_reckoned_of_what_is_kept(pictures, monkeypatch):
    pipe = tiny_sd()
    floats = weight_bytes(pipe.text_encoder)
    linear = sum(layer.weight.numel() for layer in pipe.text_encoder.modules() if type(layer) is torch.nn.Linear)
    exchange(pipe.text_encoder, Eight)
    assert weight_bytes(pipe.text_encoder) == floats - 3 * linear and not is_quantised(pipe.unet.conv_in)
    said = []
    train_module._tell_memory(pipe, train_module.TrainingConfig(superclass="teddy", name="mine"), 16, said.append)
    assert f"text encoders {memory.size_text(floats - 3 * linear)}," in said[0]


def test_a_checkpoint_is_loaded_in_8_bits(tmp_path, monkeypatch):
    pytest.importorskip("optimum.quanto")
    save_model(tmp_path / "model")
    pipe = load_pipeline(tmp_path / "model", device="cpu", text_encoder_bits=8)
    assert quantised_layers(pipe.text_encoder) and not quantised_layers(pipe.unet)
    assert weight_bytes(pipe.text_encoder) < weight_bytes(tiny_sd().text_encoder)
    monkeypatch.chdir(tmp_path)
    save_concept(tmp_path / "mine.safetensors", "teddy")
    words = ["generate", "a <mine>", "--concept", "mine.safetensors", "--model", "model", "--steps", "1", "--text-encoder-bits", "8"]
    result = CliRunner().invoke(cli.app, words, prog_name="perfusion")
    assert result.exit_code == 0, result.output


def test_8_bits_without_their_library(tmp_path, monkeypatch):
    save_model(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    with pytest.raises(ModelError, match="text encoders in 8 bits need the package optimum-quanto: pip install optimum-quanto"):
        load_pipeline(tmp_path / "model", device="cpu", text_encoder_bits=8)
    with pytest.raises(ModelError, match="text_encoder_bits must be 8, or left out, got 4"):
        load_pipeline(tmp_path / "model", device="cpu", text_encoder_bits=4)
