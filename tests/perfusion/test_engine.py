"""perfusion.engine: which operators run, what is computed when, and what a request can say for its row."""

import copy
import gc
import pickle
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch

import perfusion_kernels
from perfusion import Request
from perfusion.attention_processor import ConceptAttnProcessor
from perfusion.base import cross_attention_layers
from perfusion.handle import attach
from perfusion.prompts import PromptError
from tests.kernels.tolerance import as_run, assert_same_run
from tests.perfusion.editing import PLAIN, check_rows, draw, guided, lora, make_concept, seen, use
from tests.perfusion.tiny import tiny_sd

pytestmark = pytest.mark.models

PROMPT = "a photo of a <teddy> on a beach"


@pytest.fixture
def called(monkeypatch):
    """How often each operator was called."""
    counts = {}
    for name in ("concept_gates", "edited_attention", "fused_edited_attention", "fused_edited_projection"):
        own = getattr(perfusion_kernels, name)

        def call(*arguments, own=own, name=name, **options):
            what = f"{name} with an edit" if options.get("gates") is not None else name
            counts[what] = counts.get(what, 0) + 1
            return own(*arguments, **options)

        monkeypatch.setattr(perfusion_kernels, name, call)
    return counts


# Forms


def test_fifty_steps_project_once_and_call_no_to_k_or_to_v(handle, pipe, called):
    calls = []
    for layer in cross_attention_layers(pipe.unet).values():
        for module in (layer.to_k, layer.to_v):
            module.forward = lambda x, own=type(module).forward, module=module: calls.append(len(x)) or own(module, x)
    draw(pipe, PROMPT, num_inference_steps=50)
    assert calls == [2] * 8  # a forward of its own: called once each, for the two distinct rows
    for layer in cross_attention_layers(pipe.unet).values():
        del layer.to_k.forward, layer.to_v.forward
    calls.clear(), called.clear()
    draw(pipe, ["a <teddy>"] * 3 + ["a cat"], num_inference_steps=50)
    assert not calls and called == {"concept_gates": 1, "fused_edited_projection": 1, "edited_attention": 50 * 4}


@pytest.mark.numeric
def test_a_schedule_is_an_edit_in_the_tile_load_and_projects_nothing_again(handle, pipe, teddy, called):
    biases = [0.0, 0.2, 0.4]
    handle.set("teddy", bias=biases)
    _, forwards = seen(pipe, [PROMPT, "a cat"], num_inference_steps=5)
    for forward, bias in zip(forwards, (*biases, biases[-1], biases[-1]), strict=True):
        check_rows(pipe.unet, forward, guided([use(teddy, bias=bias)]))
    assert called == {"concept_gates": 5, "edited_attention with an edit": 5 * 4}
    handle.set("teddy", bias=lambda step: 0.1 * step, strength=[1.0, 0.5])
    _, forwards = seen(pipe, Request(PROMPT), num_inference_steps=2)
    check_rows(pipe.unet, forwards[1], [[], [use(teddy, 0.5, bias=0.1)]])
    _, forwards = seen(pipe.to(torch.float64), Request(PROMPT), num_inference_steps=2)  # what was held for float32 is made anew
    check_rows(pipe.unet, forwards[1], [[], [use(teddy, 0.5, bias=0.1)]])


@pytest.mark.numeric
def test_encodings_that_change_at_every_step_take_one_call_for_all(handle, pipe, teddy, called):
    embeds = pipe.encode_prompt([PROMPT], "cpu", 1, True)
    tables = [torch.cat(embeds[::-1]) for _ in range(6)]

    def travel(pipe, step, timestep, tensors):
        return {"prompt_embeds": tables[step].clone()}

    options = dict(callback_on_step_end=travel, callback_on_step_end_tensor_inputs=["prompt_embeds"], num_inference_steps=6)
    called.clear()
    _, forwards = seen(pipe, PROMPT, **options)
    for forward in forwards:
        check_rows(pipe.unet, forward, [[], [use(teddy)]])
    assert called["fused_edited_attention"] == 4 * 4 and "one call" in handle.explain()[0]


@pytest.mark.numeric
@pytest.mark.parametrize("by_index", [False, True])
def test_a_batch_is_its_single_runs(handle, pipe, by_index):
    handle._engine.fast_path.by_index = by_index
    prompts = [PROMPT, "a cat", "a <teapot:0.5> and a <teddy>", Request("a <teddy>", bias=0.9), "a <teddy|bias=0.0>"]
    noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    together = draw(pipe, prompts, latents=noise)
    for row, prompt in enumerate(prompts):
        assert_same_run(together[row : row + 1], as_run(lambda: draw(pipe, prompt, latents=noise[row : row + 1])))


@pytest.mark.numeric
def test_exact_keeps_the_bits_of_rows_without_a_concept(pipe, teddy):
    plain = draw(pipe, ["a dog", "a cat"])
    with attach(pipe, exact=True) as handle:
        handle.load(teddy)
        assert torch.equal(draw(pipe, [PROMPT, "a cat"])[1], plain[1]) and "exact=True" in handle.explain()[0]
        exact = as_run(lambda: draw(pipe, [PROMPT, "a cat"]))
    with attach(pipe) as handle:
        handle.load(teddy)
        assert_same_run(draw(pipe, [PROMPT, "a cat"]), exact)
        assert torch.equal(draw(pipe, ["a dog", "a cat"]), plain) and "no row of the batch" in handle.explain()[0]


def test_processors_are_there_only_while_a_concept_is_loaded(pipe, teddy):
    def own():
        return [type(layer.processor) is ConceptAttnProcessor for layer in cross_attention_layers(pipe.unet).values()]

    with attach(pipe) as handle:
        assert not any(own())
        handle.load(teddy)
        assert all(own())
        handle.unload("teddy")
        assert not any(own())


def of_layers(change):
    return lambda pipe: [change(layer) for layer in cross_attention_layers(pipe.unet).values()]


def exchanged(layer):
    layer.to_v = copy.deepcopy(layer.to_v)
    layer.to_v.base_layer.weight.mul_(1.5)


# name -> what is done before the first picture, and between it and the second one
CHANGES = {
    "the LoRA's scale": (None, lambda pipe: pipe.set_adapters("style", 0.3)),
    "the scale in a call": (None, lambda pipe: {"cross_attention_kwargs": {"scale": 0.3}}),
    "LoRA fused": (None, lambda pipe: pipe.fuse_lora(lora_scale=0.3)),
    "LoRA unfused": (lambda pipe: pipe.fuse_lora(lora_scale=0.3), lambda pipe: pipe.unfuse_lora()),
    "LoRA off": (None, lambda pipe: pipe.disable_lora()),
    "LoRA gone": (None, lambda pipe: pipe.unload_lora_weights()),
    "dtype": (None, lambda pipe: pipe.to(torch.bfloat16)),
    "a weight of keys": (None, of_layers(lambda layer: layer.to_k.base_layer.weight.mul_(1.5))),
    "a weight of values": (lambda pipe: pipe.unload_lora_weights(), of_layers(lambda layer: layer.to_v.weight.mul_(1.5))),
    "the LoRA's weight": (None, of_layers(lambda layer: layer.to_v.lora_A["style"].weight.requires_grad_(False).mul_(1.5))),
    "a module": (None, of_layers(exchanged)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_slots_are_written_anew_when_layers_change_under_the_same_embeddings(teddy, change):
    """The second picture is that of a pipeline which was never attached before the change, to the bit."""
    before, between = CHANGES[change]
    embeds, negative = tiny_sd().encode_prompt([PROMPT], "cpu", 1, True)
    options = dict(prompt_embeds=embeds, negative_prompt_embeds=negative)

    def changed():
        pipe = tiny_sd()
        lora(pipe)
        if before is not None:
            before(pipe)
        yield pipe
        yield between(pipe)

    def bound(pipe):
        handle = attach(pipe)
        handle.load(teddy)
        handle.bind(embeds, PROMPT)
        return handle

    one, other = changed(), changed()
    with bound(next(one)) as handle:
        first = draw(handle.pipe, **options)
        slots = handle._engine.slots
        given = next(one)
        given = given if isinstance(given, dict) else {}
        second = draw(handle.pipe, **options, **given)
        assert handle._engine.form == "slots" and not torch.equal(second.float(), first)
        assert change == "LoRA unfused" or not torch.allclose(second.float(), first, atol=1e-3)  # which changes roundings alone
        assert change == "dtype" or handle._engine.slots is slots
    fresh = next(other)
    next(other)
    with bound(fresh) as handle:
        assert torch.equal(draw(handle.pipe, **options, **given), second)


def test_a_lora_scaled_by_the_call_projects_once_a_prompt(pipe, teddy):
    lora(pipe)
    calls = []
    for layer in cross_attention_layers(pipe.unet).values():
        layer.to_k.scaling["style"] = 0.9  # times 0.3, and divided by it again, it is another number
        layer.to_k.base_layer.register_forward_hook(lambda *_: calls.append(1))
    with attach(pipe) as handle:
        handle.load(teddy)
        draw(pipe, PROMPT, num_inference_steps=4, cross_attention_kwargs={"scale": 0.3})
    assert len(calls) == 4 and pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.scaling["style"] != 0.9


@pytest.mark.numeric
def test_replaced_processors_are_noticed_and_said_once(handle, pipe):
    expected = as_run(lambda: draw(pipe, PROMPT))
    pipe.unet.set_default_attn_processor()
    with pytest.warns(UserWarning, match="goes on with hooks on to_k and to_v: layer .* was given another processor"):
        assert_same_run(draw(pipe, PROMPT), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        draw(pipe, PROMPT)
    assert "The fast path is closed" in handle.explain()[1]


def test_the_way_from_a_prompt_to_a_kernel_is_short_and_drawn_in_the_design(handle, pipe):
    """The reference is a backend like the others, whose function of an operator's name stands in the file of that name."""
    root = Path(perfusion_kernels.__file__).parents[1]
    functions = {str(root / f"perfusion_kernels/reference/{name}.py"): name for name in perfusion_kernels.backend.DEFAULTS}
    ways = {}

    def trace(frame, event, argument):
        operator = functions.get(frame.f_code.co_filename)
        if event == "call" and operator == frame.f_code.co_name:
            files = []
            while frame is not None:
                files.append(Path(frame.f_code.co_filename))
                frame = frame.f_back
            packages = root / "perfusion_kernels", root / "python"
            ours = [each.relative_to(root) for each in files if any(map(each.is_relative_to, packages))]
            ways[operator] = list(dict.fromkeys(ours))

    sys.setprofile(trace)
    try:
        with perfusion_kernels.use_backend("reference"):
            draw(pipe, "a red <teddy>")
    finally:
        sys.setprofile(None)
    picture = (root / "DESIGN.md").read_text(encoding="utf-8").partition("```text")[2].partition("```")[0]
    assert ways.keys() == {"concept_gates", "fused_edited_projection", "edited_attention"}
    for operator, files in ways.items():
        assert len(files) <= 5, files
        assert all(each.name in picture for each in files if each.parts[0] == "python") and operator in picture


# Requests


@pytest.mark.numeric
def test_names_resolve_per_request(handle, pipe):
    handle.load(make_concept(handle.base, "dog", seed=5), name="alice-teddy")
    both = draw(pipe, [Request("a <teddy>", names={"teddy": "alice-teddy"}), "a <teddy>"])
    assert_same_run(both[0], as_run(lambda: draw(pipe, ["a <alice-teddy>", "a cat"])[0]))
    assert not torch.allclose(both[1], draw(pipe, ["a cat", "a <alice-teddy>"])[1], atol=1e-3)
    with pytest.raises(PromptError, match="names ask for a concept 'bob', which is not loaded"):
        draw(pipe, Request("a <teddy>", names={"teddy": "bob"}))


@pytest.mark.numeric
def test_regions_hide_a_concepts_word_from_the_rest_of_the_picture(handle, pipe, teddy):
    left = torch.zeros(16, 16)
    left[:, :8] = 1
    prompt = "a <teddy> and a <teapot>"
    handle._engine.counts["slots"] = 0
    request = Request(prompt, regions={"teddy": left})
    whole, regional = draw(pipe, prompt), draw(pipe, request)
    assert not torch.allclose(whole, regional, atol=1e-3) and handle._engine.counts["slots"] == 4
    assert_same_run(draw(pipe, Request(prompt, regions={"teddy": torch.ones(4, 4)})), as_run(lambda: draw(pipe, prompt)))
    pipe.unet.set_default_attn_processor()
    with pytest.raises(ValueError, match="regions need the fast path, and it is closed: layer .* another processor"):
        draw(pipe, request)
    with pytest.raises(PromptError, match=r"the region of <teddy> must be a mask \[H, W\], got shape \[3\]"):
        Request(prompt, regions={"teddy": [1, 2, 3]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(bias={"teapott": 0.5}), r"sets bias for <teapott>, which is no concept here; there are: <teapot>, <teddy>\."),
        (dict(regions={"cat": torch.ones(4, 4)}), "sets a region for <cat>, which is no concept here"),
        (dict(regions={"teddy": torch.zeros(4, 4)}), "the region of <teddy> must have finite values, some of them above 0.5"),
        (dict(regions={"teddy": [[float("nan")]]}), "the region of <teddy> must have finite values"),
        (dict(strength=lambda step: float("nan")), "<teddy> at step 0: strength must be a number between 0 and 4, got nan"),
        (dict(bias=lambda step: [0.5, "high"][step]), "<teddy>: the function that is its bias returned no number at step 1"),
    ],
)
def test_what_a_request_says_of_nothing_is_refused_and_the_next_one_drawn(handle, pipe, given, message):
    expected = draw(pipe, PROMPT)
    with pytest.raises(PromptError, match=message):
        draw(pipe, Request(PROMPT, **given), num_inference_steps=2)
    assert torch.equal(draw(pipe, PROMPT), expected)


@pytest.mark.numeric
def test_names_in_a_request_may_be_written_as_in_a_prompt(handle, pipe):
    names = {"Bear": "teddy"}
    same = as_run(lambda: draw(pipe, Request("a <Bear> here", names=names, bias={"BEAR": 0.4})))
    assert_same_run(draw(pipe, "a <teddy|bias=0.4> here"), same)


def test_gates_by_word_follow_the_places_of_the_words(handle, pipe, called):
    rows = []
    own = perfusion_kernels.concept_gates
    perfusion_kernels.concept_gates = lambda *arguments, **options: rows.append((own(*arguments, **options)[0], options)) or own(*arguments, **options)
    try:
        draw(pipe, [Request("a <teddy> and a red <teapot>", gate="word"), "a <teddy>"], guidance_scale=1.0)
    finally:
        perfusion_kernels.concept_gates = own
    gates, options = rows[0]
    assert options["places"].tolist() == [[[2], [6]], [[-1], [-1]]]
    assert (gates[0, 2, 0] >= 0.7) and (gates[0, 6, 1] >= 0.7) and gates[0, 2, 1] == 0 and gates[0, 6, 0] == 0


# Identity


def test_encodings_are_known_after_scaling_weighting_casts_files_and_joining(handle, pipe, tmp_path):
    positive, negative = pipe.encode_prompt([PROMPT], "cpu", 1, True)
    options = dict(negative_prompt_embeds=negative)
    draw(pipe, prompt_embeds=positive, **options)
    torch.save(positive, tmp_path / "embeds.pt")
    weighted = positive.clone()
    weighted[:, 5] *= 1.4
    for same in (positive * 1.1, positive + 1e-6, positive.half().float(), weighted, torch.load(tmp_path / "embeds.pt")):
        draw(pipe, prompt_embeds=same, **options)
        assert handle._engine.form == "slots"
    other = pipe.encode_prompt(["a red <teapot>"], "cpu", 1, False)[0]
    joined = torch.cat([positive, other], 1)
    found = handle.rows_of(torch.cat([joined, torch.cat([negative, negative], 1)]))
    assert {row: [mention.name for mention in request.mentions] for row, request in found.items()} == {0: ["teddy", "teapot"]}
    assert found[0].places == ((5,), (77 + 3,))


@pytest.mark.numeric
def test_plain_words_are_not_taken_for_a_concept(handle, pipe):
    plain = as_run(lambda: draw(pipe, PLAIN))
    draw(pipe, PROMPT)
    embeds, negative = pipe.encode_prompt(PLAIN, "cpu", 1, True)
    assert_same_run(draw(pipe, prompt_embeds=embeds + 1e-7, negative_prompt_embeds=negative), plain)
    assert handle._engine.form == "stock"


@pytest.mark.numeric
def test_bind_says_how_an_encoding_was_made_also_without_text_encoders(pipe, teddy):
    with attach(pipe) as handle:
        handle.load(teddy)
        positive, negative = pipe.encode_prompt([PROMPT], "cpu", 1, True)
        expected = as_run(lambda: draw(pipe, prompt_embeds=positive, negative_prompt_embeds=negative))
    pipe.text_encoder = None
    with attach(pipe) as handle:
        handle.load(teddy)
        unknown = draw(pipe, prompt_embeds=positive, negative_prompt_embeds=negative)
        assert not torch.allclose(unknown.double(), expected.value, atol=1e-3)
        handle.bind(positive, PROMPT)
        assert_same_run(draw(pipe, prompt_embeds=positive, negative_prompt_embeds=negative), expected)
        with pytest.raises(ValueError, match=r"bind: encodings must be \[R, T, 16\] with one prompt for each"):
            handle.bind(positive[..., :8], PROMPT)


def test_an_unknown_encoding_that_holds_a_concept_is_warned_of(pipe, teddy):
    with attach(pipe) as handle:
        handle.load(teddy)
        made = torch.randn(1, 77, 16)
        made[0, 4] = teddy.target
        with pytest.warns(UserWarning, match=r"seems to hold <teddy> \(similarity .*\), and perfusion does not know it"):
            draw(pipe, prompt_embeds=made, guidance_scale=1.0)


# What is exchanged, copied or shared


def test_exchanged_parts_and_copies_are_refused_in_a_sentence(handle, pipe):
    with pytest.raises(RuntimeError, match="cannot be copied: detach, copy, and attach to both"):
        copy.deepcopy(pipe)
    with pytest.raises(RuntimeError, match="cannot be pickled: detach first"):
        pickle.dumps(handle)
    own, tokenizer = pipe.unet, pipe.tokenizer
    pipe.unet = tiny_sd(seed=1).unet
    with pytest.raises(RuntimeError, match="pipe.unet was exchanged after attach"):
        draw(pipe, PROMPT)
    pipe.unet, pipe.tokenizer = own, copy.deepcopy(tokenizer)
    with pytest.raises(RuntimeError, match="a text encoder or tokenizer was exchanged after attach"):
        draw(pipe, PROMPT)
    pipe.tokenizer = tokenizer
    draw(pipe, PROMPT)


@pytest.mark.parametrize("detached", [True, False])
def test_a_pipeline_that_is_forgotten_is_freed_with_all_that_served_it(detached):
    pipe = tiny_sd()
    unet, handle = weakref.ref(pipe.unet), attach(pipe)
    handle.load(make_concept(handle.base, "teddy"))
    draw(pipe, PROMPT, num_inference_steps=1)
    if detached:
        handle.detach()
    del pipe, handle
    gc.collect()
    assert unet() is None


def test_a_pipeline_of_the_same_parts_says_that_it_does_not_know_the_concept(pipe, teddy):
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with attach(pipe, capacity=1) as handle:
        handle.load(teddy)
        with pytest.raises(ValueError, match="slots are in use"):
            handle.load(make_concept(handle.base, "dog", seed=2))
        with pytest.warns(UserWarning, match="<teddy> was encoded by something else than the pipeline that perfusion is attached to"):
            draw(other, "a <teddy> on the beach")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            draw(other, "a teddy on the beach")
            draw(other, "a <dog> on the beach")
            draw(pipe, "a <teddy> on the beach")


def test_graphs_without_cuda_say_so(pipe):
    with pytest.warns(UserWarning, match="graphs=True needs the UNet on a CUDA device"), attach(pipe, graphs=True) as handle:
        assert handle.memory()["slots"] == 0
