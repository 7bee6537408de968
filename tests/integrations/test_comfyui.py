"""The ComfyUI node pack against ComfyUI's interface: what attention reads is what the diffusers pipelines read."""

import re

import pytest
import torch

from perfusion import attach
from perfusion.base import describe_base, text_encoders
from perfusion.checkpoint_file import Kind
from tests.integrations import comfyui as stand_in
from tests.integrations import real_comfyui
from tests.perfusion.editing import make_concept, watch
from tests.perfusion.original_layout import pipeline_of, use_small_families

PROMPT = "a photo of a <mine> on a beach"


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def pipe(request):
    with pytest.MonkeyPatch.context() as patch:
        use_small_families(patch)
        yield pipeline_of(Kind(request.param, 4, "epsilon", True))


@pytest.fixture(params=["stand-in", "real"])
def comfyui(request):
    if request.param == "real" and not real_comfyui.FOLDER:
        pytest.skip("PERFUSION_COMFYUI names no folder of ComfyUI")
    return real_comfyui if request.param == "real" else stand_in


@pytest.fixture
def nodes(comfyui, monkeypatch, tmp_path):
    return comfyui.load_nodes(monkeypatch, tmp_path).NODE_CLASS_MAPPINGS


@pytest.fixture
def run(nodes):
    def call(name, /, **inputs):
        node = nodes[f"Perfusion{name}"]
        return getattr(node(), node.FUNCTION)(**inputs)[0]

    return call


@pytest.fixture
def concept_file(pipe, tmp_path, run):
    def make(name="mine", **fields):
        (tmp_path / "perfusion").mkdir(exist_ok=True)
        fields = {"superclass": "coffee mug", "license": name, **fields}
        make_concept(describe_base(pipe), name, **fields).save(tmp_path / "perfusion" / f"{name}.safetensors", torch.float32)
        return run("LoadConcept", concept=f"{name}.safetensors")

    return make


def reference(pipe, prompt, *files, **settings):
    """layer -> K, V of the conditional row in the diffusers pipeline."""
    with attach(pipe) as handle:
        for file in files:
            handle.set(handle.load(file), **settings)
        with watch(pipe.unet) as forwards:
            pipe(prompt, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    return forwards[0]


def compare(layers, expected, row=0):
    for name, (key, value, *_) in layers.items():
        for kind, ours, theirs in (("K", key, expected.keys[name]), ("V", value, expected.values[name])):
            torch.testing.assert_close(ours[row], theirs[0], rtol=0, atol=2e-5 * theirs.abs().max().item(), msg=f"{kind} of {name}")


@pytest.mark.parametrize("unlocked", [False, True], ids=["locked", "unlocked"])
def test_a_concept_is_drawn_as_in_the_pipelines(comfyui, pipe, run, concept_file, tmp_path, unlocked):
    concepts = run("ConceptSettings", concepts=concept_file(unlocked=unlocked), strength=0.8, bias=0.4, temperature=0.3, name="<mine>")
    clip, model = comfyui.CLIP(pipe), comfyui.ModelPatcher(pipe)
    positive = run("TextEncode", clip=clip, concepts=concepts, text=PROMPT)
    negative = clip.encode_from_tokens_scheduled(clip.tokenize("a photo of a coffee mug, blurry"))
    patched = run("Apply", model=model, conditioning=positive)
    context = torch.cat([negative[0][0], positive[0][0]])  # as the sampler batches them
    expected = reference(pipe, PROMPT, tmp_path / "perfusion" / "mine.safetensors", strength=0.8, bias=0.4, temperature=0.3)
    torch.testing.assert_close(positive[0][0], expected.encodings, rtol=0, atol=1e-5)
    layers, plain = patched.forward(context), model.forward(context)
    compare(layers, expected, row=1)
    for name, (key, value, _, output) in layers.items():  # the row without a concept keeps its bits, and the model that was given its own
        assert torch.equal(key[0], plain[name][0][0]) and torch.equal(value[0], plain[name][1][0]) and torch.equal(output[0], plain[name][3][0])
        assert not torch.equal(output[1], plain[name][3][1])
    assert model.model_options == {"transformer_options": {}}


def test_several_concepts_weights_and_long_prompts(comfyui, pipe, run, concept_file, tmp_path):
    both = run("CombineConcepts", concepts=concept_file(), more=concept_file("other", seed=2, superclass="stuffed animal"))
    clip, model = comfyui.CLIP(pipe), comfyui.ModelPatcher(pipe)

    def encode(text):
        return run("TextEncode", clip=clip, concepts=both, text=text)

    files = [tmp_path / "perfusion" / f"{name}.safetensors" for name in ("mine", "other")]
    prompt = "a <mine> beside an <other|bias=0.5> in the snow"
    compare(run("Apply", model=model, conditioning=encode(prompt)).forward(encode(prompt)[0][0]), reference(pipe, prompt, *files))

    # weighted, and in the second chunk: the word is found, and every other token is where it was
    for text in ("a (<mine>:1.3) on a beach", ", ".join(["a very long description of a beach"] * 12) + ", with a <mine> and a hat"):
        positive = encode(text)
        plain = clip.tokenize(text.replace("<mine>", "coffee mug"))
        (use,) = positive[0][1]["perfusion"]
        place = int((positive[0][0][0] == use.encodings[0].to(positive[0][0])).all(-1).nonzero().squeeze())
        ids = [token for chunk in plain["l"] for token, _ in chunk]
        assert ids[place] == clip.parts["l"][0]("mug").input_ids[1] and len(ids) == positive[0][0].shape[1]
        layers, without = run("Apply", model=model, conditioning=positive).forward(positive[0][0]), model.forward(positive[0][0])
        assert all(not torch.equal(layers[name][1][0, place], without[name][1][0, place]) for name in layers)


def test_two_applies_two_patches_and_half_precision(comfyui, pipe, run, concept_file, tmp_path):
    mine, other = concept_file(), concept_file("other", seed=2, superclass="teddy bear")
    clip, model = comfyui.CLIP(pipe), comfyui.ModelPatcher(pipe)
    one, two = run("TextEncode", clip=clip, concepts=mine, text="a <mine>"), run("TextEncode", clip=clip, concepts=other, text="an <other>")
    calls = []
    block = next(iter(model.model.diffusion_model.names))

    def foreign(q, k, v, options):
        calls.append(len(q))
        return comfyui.optimized_attention(q, k, v, options["n_heads"])

    model = model.clone()
    model.set_model_attn2_replace(foreign, *block)
    chained = run("Apply", model=run("Apply", model=model, conditioning=one), conditioning=two).clone()  # copies work, too
    layers = chained.forward(torch.cat([one[0][0], two[0][0]]))
    assert calls == [2]
    compare(layers, reference(pipe, "a <mine>", tmp_path / "perfusion" / "mine.safetensors"), row=0)
    compare(layers, reference(pipe, "an <other>", tmp_path / "perfusion" / "other.safetensors"), row=1)
    half = run("Apply", model=model, conditioning=one).forward(one[0][0].half().float())  # known after a cast
    assert all((half[name][1] - layers[name][1][:1]).abs().max() < 0.02 * layers[name][1].abs().max() for name in half)


def test_a_region_keeps_the_word_inside(comfyui, pipe, run, concept_file):
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    concepts = run("ConceptRegion", concepts=concept_file(), mask=mask)
    clip, model = comfyui.CLIP(pipe), comfyui.ModelPatcher(pipe)
    positive = run("TextEncode", clip=clip, concepts=concepts, text=PROMPT)
    layers = run("Apply", model=model, conditioning=positive).forward(positive[0][0], size=(8, 8))
    free = run("Apply", model=model, conditioning=run("TextEncode", clip=clip, concepts=concept_file(), text=PROMPT)).forward(positive[0][0])
    (use,) = positive[0][1]["perfusion"]
    place = int((positive[0][0][0] == use.encodings[0]).all(-1).nonzero().squeeze())
    for name, (_, _, seen, output) in layers.items():
        closed = seen[0].reshape(8, 8, -1) < 0
        assert closed[:, :4, place].all() and not closed[:, 4:].any() and closed.sum() == 32
        same = torch.isclose(output, free[name][3], atol=1e-5).all(-1)[0].reshape(8, 8)
        assert same[:, 4:].all() and not same[:, :4].any()


def test_refusals(comfyui, pipe, run, nodes, concept_file, tmp_path, monkeypatch):
    concepts, clip, model = concept_file(), comfyui.CLIP(pipe), comfyui.ModelPatcher(pipe)
    assert nodes["PerfusionLoadConcept"].INPUT_TYPES()["required"]["concept"] == (["mine.safetensors"],)
    assert nodes["PerfusionLoadConcept"].IS_CHANGED("mine.safetensors") > 0
    for wanted, name, inputs in (
        ("no concept <nobody> is loaded; loaded are: <mine>", "TextEncode", dict(clip=clip, concepts=concepts, text="a <nobody>")),
        ("there is no concept <x>; loaded are: <mine>", "ConceptSettings", dict(concepts=concepts, strength=1.0, bias=0.5, temperature=0.1, name="x")),
        ("bias must be a number between", "ConceptSettings", dict(concepts=concepts, strength=1.0, bias=7.0, temperature=0.1)),
        ("the conditioning names no concept", "Apply", dict(model=model, conditioning=clip.encode_from_tokens_scheduled(clip.tokenize("a mug")))),
        ("one mask, and 2 came", "ConceptRegion", dict(concepts=concepts, mask=torch.ones(2, 8, 8))),
        ("has no text encoder", "TextEncode", dict(clip=None, concepts=concepts, text="a <mine>")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(wanted)):
            run(name, **inputs)
    with pytest.MonkeyPatch.context() as patch:
        use_small_families(patch)
        other = pipeline_of(Kind("sd2", 4, "epsilon", True))
    positive = run("TextEncode", clip=clip, concepts=concepts, text="a <mine>")
    with pytest.raises(ValueError, match="this model is another one: its layer input"):
        run("Apply", model=comfyui.ModelPatcher(other), conditioning=positive)


def test_the_nodes_follow_the_conventions(comfyui, monkeypatch, tmp_path):
    pack = comfyui.load_nodes(monkeypatch, tmp_path)
    assert set(pack.NODE_CLASS_MAPPINGS) == set(pack.NODE_DISPLAY_NAME_MAPPINGS)
    readme = (stand_in.PACK / "README.md").read_text(encoding="utf-8")
    for key, node in pack.NODE_CLASS_MAPPINGS.items():
        inputs = node.INPUT_TYPES()
        assert set(inputs) <= {"required", "optional"} and callable(getattr(node, node.FUNCTION)) and node.CATEGORY == "perfusion"
        assert all(isinstance(each, tuple) for part in inputs.values() for each in part.values()) and isinstance(node.RETURN_TYPES, tuple)
        assert pack.NODE_DISPLAY_NAME_MAPPINGS[key] in readme


@pytest.mark.parametrize("comfyui", ["real"], indirect=True)
def test_comfyui_itself_draws_what_the_pipelines_draw(comfyui, pipe, run, concept_file, tmp_path):
    if len(text_encoders(pipe)) == 2:
        pytest.skip("a narrow XL model has no place for ComfyUI's size embeddings; its blocks are compared above")
    from comfy.sample import sample

    positive = run("TextEncode", clip=(clip := comfyui.CLIP(pipe)), concepts=concept_file(), text=PROMPT)
    negative = clip.encode_from_tokens_scheduled(clip.tokenize("blurry"))
    model = comfyui.ModelPatcher(pipe)
    patched = run("Apply", model=model, conditioning=positive)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([500])
    with attach(pipe) as handle, torch.no_grad():
        handle.load(tmp_path / "perfusion" / "mine.safetensors")
        encoding = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
        expected = pipe.unet(noise, time, encoder_hidden_states=encoding).sample
        options = patched.model_options["transformer_options"].copy()
        whole = patched.model.diffusion_model(noise, time, context=positive[0][0], transformer_options=options)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    drawn, plain = (
        sample(each, noise, 2, 3.0, "euler", "normal", positive, negative, torch.zeros_like(noise), seed=0, disable_pbar=True)
        for each in (patched, model)
    )
    assert drawn.isfinite().all() and (drawn - plain).abs().max() > 1e-3 * plain.abs().max()
