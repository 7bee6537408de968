"""The hook in diffusers' pipelines: prompts, batches, and encodings that are given, kept or changed on the way."""

import contextlib
import gc
import weakref

import pytest
import torch

from perfusion.base import describe_base
from perfusion.batch_plan import Plan
from perfusion.handle import attach
from perfusion.prompts import PromptError
from tests.perfusion.editing import PROMPTS, check_rows, draw, guided, make_concept, seen, unguided, use, watch


@pytest.mark.numeric
def test_every_row_has_its_own_concepts_and_settings(attached, sd, teddy):
    pot = make_concept(attached.base, "teapot", seed=2, unlocked=True)
    attached.load(pot)
    prompts = ["a <teddy>", "a <teddy|bias=0.7>", "a <teddy:0.5> in a <teapot>", "a cat"]
    negative = ["a <teapot|temperature=0.9>", "", "bad", "a <teddy|bias=-0.3>"]
    rows = [
        *([use(pot, temperature=0.9)], [], [], [use(teddy, bias=-0.3)]),
        *([use(teddy)], [use(teddy, bias=0.7)], [use(teddy, 0.5), use(pot)], []),
    ]
    _, forwards = seen(sd, prompts, negative_prompt=negative, num_images_per_prompt=2)
    for forward in forwards:
        check_rows(sd.unet, forward, [row for row in rows for _ in range(2)])


@pytest.mark.numeric
def test_prompt_and_negative_prompt_may_differ_in_settings_only(attached, sd, teddy):
    _, forwards = seen(sd, "a <teddy|bias=0.1>", negative_prompt="a <teddy|bias=0.9>")
    check_rows(sd.unet, forwards[0], [[use(teddy, bias=0.9)], [use(teddy, bias=0.1)]])


@pytest.mark.numeric
def test_the_second_encoder_of_xl_may_read_another_prompt(sdxl):
    teddy, pot = (make_concept(describe_base(sdxl), name, seed=seed) for seed, name in enumerate(("teddy", "teapot"), 1))
    with attach(sdxl) as handle:
        handle.load(teddy)
        handle.load(pot)
        _, forwards = seen(sdxl, "a <teddy>", prompt_2="a red <teapot>", negative_prompt="a <teapot>", negative_prompt_2="bad")
        check_rows(sdxl.unet, forwards[0], [[use(pot)], [use(teddy), use(pot)]])


@pytest.mark.numeric
@pytest.mark.parametrize("cast", [torch.float32, torch.float16])
def test_prompt_embeds_given_directly(attached, sd, teddy, cast):
    expected = draw(sd, PROMPTS)
    positive, negative = (embeds.to(cast).clone() for embeds in sd.encode_prompt(PROMPTS, "cpu", 1, True))
    images, forwards = seen(sd, prompt_embeds=positive, negative_prompt_embeds=negative)
    check_rows(sd.unet, forwards[0], guided([use(teddy)]))
    assert torch.equal(images, expected) == (cast == torch.float32)
    # one row alone, and rows in another order
    check_rows(sd.unet, seen(sd, prompt_embeds=positive[:1], guidance_scale=1.0)[1][0], [[use(teddy)]])
    check_rows(sd.unet, seen(sd, prompt_embeds=positive[[1, 0, 0]], guidance_scale=1.0)[1][0], [[], [use(teddy)], [use(teddy)]])


def test_the_text_encoder_may_go_once_prompts_are_encoded(fresh):
    expected = draw(fresh, PROMPTS)
    positive, negative = fresh.encode_prompt(PROMPTS, "cpu", 1, True)
    fresh.text_encoder = fresh.tokenizer = None
    assert torch.equal(draw(fresh, prompt_embeds=positive, negative_prompt_embeds=negative), expected)


@pytest.mark.numeric
def test_prompt_embeds_of_xl_given_directly(sdxl):
    teddy = make_concept(describe_base(sdxl), "teddy")
    with attach(sdxl) as handle:
        handle.load(teddy)
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        embeds = dict(zip(names, sdxl.encode_prompt(PROMPTS, device="cpu")))
        images, forwards = seen(sdxl, **embeds)
        check_rows(sdxl.unet, forwards[0], guided([use(teddy)]))
        assert torch.equal(images, draw(sdxl, PROMPTS))


@pytest.mark.numeric
def test_prompts_that_differ_in_settings_only_may_be_encoded_one_by_one(attached, sd, teddy):
    embeds = {bias: sd.encode_prompt(f"a <teddy|bias={bias}>", "cpu", 1, False)[0] for bias in (0.0, 0.5)}
    for bias, each in embeds.items():
        check_rows(sd.unet, seen(sd, prompt_embeds=each, guidance_scale=1.0)[1][0], [[use(teddy, bias=bias)]])


@pytest.mark.numeric
def test_a_callback_may_end_guidance(attached, sd, teddy):
    def cut(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": tensors["prompt_embeds"][-2:]}

    options = dict(callback_on_step_end=cut, callback_on_step_end_tensor_inputs=["prompt_embeds"], num_inference_steps=3)
    _, forwards = seen(sd, PROMPTS, **options)
    for forward, rows in zip(forwards, (guided, unguided, unguided), strict=True):
        check_rows(sd.unet, forward, rows([use(teddy)]))


@pytest.mark.numeric
def test_a_callback_may_change_the_prompt_in_place(attached, sd, teddy):
    """Under inference_mode a tensor counts no versions, and the change must be noticed all the same."""
    other = sd.encode_prompt(["a cat", "a <teddy>"], "cpu", 1, False)[0].clone()

    def change(pipe, step, timestep, tensors):
        tensors["prompt_embeds"][2:] = other
        return {}

    options = dict(callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    for mode in (torch.inference_mode, contextlib.nullcontext):
        with mode():
            _, forwards = seen(sd, PROMPTS, **options)
        check_rows(sd.unet, forwards[0], [[], [], [use(teddy)], []])
        check_rows(sd.unet, forwards[1], [[], [], [], [use(teddy)]])


@pytest.mark.numeric
def test_prompt_embeds_changed_in_place_between_calls_under_inference_mode(attached, sd, teddy):
    with torch.inference_mode():
        embeds, other = (sd.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in ("a <teddy>", "a cat"))
        check_rows(sd.unet, seen(sd, prompt_embeds=embeds, guidance_scale=1.0)[1][0], [[use(teddy)]])
        embeds.copy_(other)
        check_rows(sd.unet, seen(sd, prompt_embeds=embeds, guidance_scale=1.0)[1][0], [[]])


def test_nothing_is_kept_of_a_prompt_but_its_digest(attached, sd, monkeypatch):
    plans = []
    own = Plan.describe

    def describe(plan, encodings, *rest):
        plans.append((weakref.ref(plan), weakref.ref(encodings)))
        own(plan, encodings, *rest)

    monkeypatch.setattr(Plan, "describe", describe)
    draw(sd, PROMPTS)
    attached.load(make_concept(attached.base, "teapot"))  # what is shown to the layers is let go with the next prompt or change
    attached.set("teapot", bias=0.5)
    gc.collect()
    assert len(plans) == 1 and plans[0][0]() is None and plans[0][1]() is None


@pytest.mark.parametrize("prompt", [("a <teddy>",), []])
def test_prompts_that_diffusers_does_not_take(sd, attached, prompt):
    """Whatever it does with them without concepts, it does with them."""

    def outcome(prompt):
        try:
            return tuple(draw(sd, prompt).shape)
        except Exception as error:
            return type(error), str(error).replace("<teddy>", "teddy")

    assert outcome(prompt) == outcome(type(prompt)(text.replace("<teddy>", "teddy") for text in prompt))


def test_refusals_come_before_the_first_step(sd, attached):
    refused = {"a <bear>": "no concept <bear> is loaded; loaded are: <teddy>", "a " * 80 + "<teddy>": "beyond the 77 tokens"}
    for prompt, message in refused.items():
        with watch(sd.unet) as forwards, pytest.raises(PromptError, match=message):
            draw(sd, prompt)
        assert not forwards
