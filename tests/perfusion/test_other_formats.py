"""A concept as a LoRA and an embedding: what diffusers, peft and kohya's names make of it is the formula."""

import re

import pytest
import torch
from safetensors.torch import load_file

from perfusion.base import cross_attention_layers, describe_base
from perfusion.captions import everyday_captions
from perfusion.convert import ConversionError
from perfusion.handle import attach
from perfusion.models import add_embedding, add_lora
from perfusion.original_names import original_name
from perfusion.other_formats import EXPORTS, export, fit_scale
from tests.kernels.tolerance import as_run, assert_close, assert_same_run, exactly
from tests.perfusion.editing import draw, make_concept, watch, weight_of
from tests.perfusion.tiny import WORDS, tiny_sd, tiny_sdxl

pytestmark = pytest.mark.models

SCALE = 0.9


@pytest.fixture(params=[tiny_sd, tiny_sdxl], ids=["sd", "sdxl"])
def pipe(request):
    return request.param()


def projected(pipe, concept, encodings, name, kind):
    """K or V of encodings [R, T, D] in one layer, with κ c in the gate's place; in float64."""
    target, metric_target = concept.target.double(), concept.metric_target.double()
    c = SCALE * (encodings.double() @ metric_target / (target @ metric_target))
    weight = weight_of(getattr(cross_attention_layers(pipe.unet)[name], kind).base_layer).double()
    output = weight @ concept.superclass_encoding.double() if kind == "to_k" else concept.value_output(name).double()
    return (encodings.double() - (c / SCALE)[..., None] * target) @ weight.T + c[..., None] * output


@pytest.mark.numeric
@pytest.mark.parametrize("superclass", ["teddy", "toy boat"])
@pytest.mark.parametrize("to", ["lora", "a1111", "comfyui"])
def test_loaded_by_diffusers_it_is_the_formula(pipe, tmp_path, to, superclass):
    concept = make_concept(describe_base(pipe), "mine", superclass=superclass)
    with attach(pipe) as handle:
        handle.load(concept)
        with torch.no_grad():
            options = dict(device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
            whole = as_run(lambda: pipe.encode_prompt(prompt="a <mine> on a beach", **options)[0])
    files, notes = export(concept, pipe, to, tmp_path, scale=SCALE, dtype=torch.float32)
    lora = next(file for file in files if "ora" in str(file.relative_to(tmp_path)))
    (embedding,) = (file for file in files if file != lora)
    assert add_lora(pipe, str(lora)) and add_embedding(pipe, str(embedding), token="<mine>") == "<mine>"
    with watch(pipe.unet) as forwards:
        draw(pipe, "a <mine> on a beach", guidance_scale=1.0)
    assert_same_run(forwards[0].encodings, whole)  # the embedding stands where the concept's word stood
    for kind, seen in (("to_k", forwards[0].keys), ("to_v", forwards[0].values)):
        assert set(seen) == set(cross_attention_layers(pipe.unet))
        for name, values in seen.items():
            assert_close(values, *exactly(projected, pipe, concept, forwards[0].encodings, name, kind), f"{name}.{kind}")
    assert len(notes) == 1 and "mine" in notes[0]


@pytest.mark.numeric
def test_the_scale_is_the_least_squares_one(pipe):
    concept = make_concept(describe_base(pipe), "mine", superclass="teddy")
    fit = fit_scale(concept, pipe, captions=16)

    def by_least_squares(handle):
        """Of encodings made one by one; the word's tokens weigh as much as all others."""
        g, c, here = [], [], []
        for number, text in enumerate(everyday_captions(16)):
            text = " ".join(word for word in re.findall(r"[\w'-]+", text) if word.lower() in WORDS or len(word) == 1)
            head = ("a {}", "a photo of a {}", "a picture of the {}", "{}")[number % 4]
            for prompt in (f"{head.format('<mine>')}, {text}", text):
                encoding = pipe.encode_prompt(prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0][0]
                count = len(pipe.tokenizer(prompt.replace("<mine>", "teddy"), truncation=True).input_ids)
                c.append(concept.similarity(encoding[:count]).double())
                g.append(concept.gate(encoding[:count]).double())
                here.append(torch.zeros(count, dtype=torch.bool))
                if prompt != text:
                    here[-1][len(head.split())] = True
        g, c, here = torch.cat(g), torch.cat(c), torch.cat(here)
        weights = torch.where(here, 1 / here.sum(), 1 / (~here).sum()).sqrt()
        scale = torch.linalg.lstsq((weights * c)[:, None], (weights * g)[:, None]).solution.squeeze()
        return scale.float(), ((weights * (g - scale * c)).norm() / (weights * g).norm()).float()

    with attach(pipe) as handle, torch.no_grad():
        handle.load(concept)
        for mine, expected in zip((fit.scale, fit.loss), as_run(lambda: by_least_squares(handle))):
            assert_same_run(torch.tensor(mine), expected)
    assert f"κ = {fit.scale:.3f}" in str(fit)


def test_the_file_of_real_sizes_is_small():
    """For SD 1.5: 16 layers, both projections: a down of 768 and an up of the layer's width, in half precision."""
    ups = 2 * 12_480 + 16 * 2 * 768
    assert 2 * ups < 101_000


def test_original_names_of_sdxl():
    assert original_name("down_blocks.1.attentions.0.x.attn2", 2) == "input_blocks.4.1.x.attn2"
    assert original_name("down_blocks.2.attentions.1.x", 2) == "input_blocks.8.1.x"
    assert original_name("up_blocks.0.attentions.2.x", 2) == "output_blocks.2.1.x"
    assert original_name("up_blocks.1.attentions.0.x", 2) == "output_blocks.3.1.x"
    assert original_name("mid_block.attentions.0.x", 2) == "middle_block.1.x"


def test_what_other_programs_expect_to_find(pipe, tmp_path):
    concept = make_concept(describe_base(pipe), "mine", superclass="teddy", license="CC-BY-4.0")
    found = {to: {str(file.relative_to(tmp_path / to)): load_file(file) for file in export(concept, pipe, to, tmp_path / to, scale=1.0)[0]} for to in EXPORTS}
    two = len(concept.word_embeddings) == 2
    words = {"clip_l", "clip_g"} if two else {"emb_params"}
    assert set(found["embedding"]) == {"mine-embedding.safetensors"}
    assert set(found["a1111"]) == {"models/Lora/mine.safetensors", "embeddings/mine.safetensors"}
    assert set(found["comfyui"]) == {"models/loras/mine.safetensors", "models/embeddings/mine.safetensors"}
    assert set(found["a1111"]["embeddings/mine.safetensors"]) == words
    kohya = found["a1111"]["models/Lora/mine.safetensors"]
    assert {name.rsplit(".", 2 if name.endswith("weight") else 1)[0].rsplit("_", 2)[1] for name in kohya} == {"to"}
    start = "lora_unet_input_blocks_" if two else "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_"
    assert any(name.startswith(start) for name in kohya) and all(name.startswith("lora_unet_") for name in kohya)
    for name, up in kohya.items():
        if name.endswith("lora_up.weight"):
            assert up.shape[1] == 1 and up.dtype == torch.float16 and kohya[name.replace("lora_up.weight", "alpha")] == 1


def test_refusals(pipe, tmp_path):
    base = describe_base(pipe)
    with pytest.raises(ConversionError, match="has keys of its own, trained without the key lock.* Train with the key lock"):
        export(make_concept(base, "mine", unlocked=True), pipe, "lora", tmp_path, scale=1.0)
    with pytest.raises(ConversionError, match="cannot be exported with this model: made for"):
        export(make_concept(describe_base(tiny_sd(seed=9)), "mine"), pipe, "lora", tmp_path, scale=1.0)
    with pytest.raises(ConversionError, match="to must be one of lora, embedding, a1111, comfyui, got 'onnx'"):
        export(make_concept(base, "mine"), pipe, "onnx", tmp_path)
    assert not list(tmp_path.iterdir())
