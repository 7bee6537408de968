"""Which path a concept takes in each layer, said before anything is drawn: by `Handle.layer_paths` and `perfusion doctor --model`."""

import json
import re

import pytest
from typer.testing import CliRunner

from perfusion import models
from perfusion.base import cross_attention_layers, denoiser
from perfusion.cli import app, doctor
from perfusion.handle import attach
from tests.perfusion.editing import PROMPTS, draw
from tests.perfusion.pipeline_matrix import REFUSED, concept_of, group_offload, ip_adapter, lora
from tests.perfusion.tiny import tiny_pixart, tiny_sd, tiny_sdxl


def one_hook(pipe, handle=None):
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.register_forward_hook(lambda *arguments: None)


CHANGES = {
    "nothing": (lambda pipe, handle: None, "slots", "Projections of all layers are two products, once per prompt."),
    "a hook": (one_hook, "slots", "Projections are called layer by layer, once per prompt: to_k of mid_block.* has hooks."),
    "LoRA": (lora, "slots", "Projections are called layer by layer, once per prompt: to_k of .* is a peft.tuners.lora.layer.Linear."),
    "slicing": (lambda pipe, handle: pipe.enable_attention_slicing(1), "hooks", "The fast path is closed: layer .* processor.*, SlicedAttnProcessor."),
    "IP-Adapter": (ip_adapter, "hooks", "The fast path is closed: layer .*, IPAdapterAttnProcessor2_0."),
    "blocks": (group_offload("block_level", num_blocks_per_group=1), "hooks", "The fast path is closed: .* is offloaded as a block."),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("loaded", [False, True])
def test_every_layer_says_its_path_in_the_words_of_explain(change, loaded):
    do, path, sentence = CHANGES[change]
    pipe = tiny_sd()
    with attach(pipe) as handle:
        if loaded:
            handle.load(concept_of(pipe))
        do(pipe, handle)
        found = handle.layer_paths()
        assert list(found) == list(cross_attention_layers(pipe.unet)) and {each for each, _ in found.values()} == {path}
        said = [reason for _, reason in found.values()]
        assert all(re.fullmatch(sentence, each) for each in said)
        if loaded and change != "IP-Adapter":  # which wants a picture
            draw(pipe, PROMPTS)
            assert handle.explain()[-1] in said and handle._engine.form == path


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: iter(()))
    return lambda *arguments: CliRunner().invoke(app, ["doctor", *arguments])


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, tiny_pixart])
def test_the_doctor_lists_the_layers_of_a_folder(run, make, tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path / "model")
    result = run("--model", str(tmp_path / "model"))
    assert result.exit_code == 0, result.output
    for name in cross_attention_layers(denoiser(pipe)):
        line = next(line for line in result.stdout.splitlines() if f" {name} " in line)
        assert line.startswith("ok  layer ") and line.endswith("fast. Projections of all layers are two products, once per prompt.")
    assert f"ok  model     {type(pipe).__name__}" in result.stdout


def test_the_doctor_says_what_is_off_and_what_is_refused(run, monkeypatch):
    def sliced(*arguments, **options):
        pipe = tiny_sd()
        pipe.enable_attention_slicing(1)
        return pipe

    monkeypatch.setattr(models, "load_pipeline", sliced)
    result = run("--model", "any", "--json")
    layers = [finding for finding in json.loads(result.stdout)["findings"] if finding["area"] == "layer"]
    assert len(layers) == 4 and result.exit_code == 0
    for finding in layers:
        closed = f"layer {finding['name']} has a processor of its own, SlicedAttnProcessor"
        assert finding["state"] == "off" and finding["detail"] == f"hooks. The fast path is closed: {closed}."
    refusal = next(each for each in REFUSED if each.name == "FluxPipeline")
    monkeypatch.setattr(models, "load_pipeline", lambda *arguments, **options: refusal.build())
    result = run("--model", "any")
    assert result.exit_code == 1 and refusal.reason in result.stdout and refusal.instead in result.stdout


def test_a_lora_without_a_model_is_refused(run):
    result = run("--lora", "style.safetensors")
    assert result.exit_code == 2 and "give one with --model" in result.output
