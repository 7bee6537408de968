"""The hook in diffusers' pipelines: what every row sees in attention, what stays bit-equal, and what else users switch on."""

import contextlib
import weakref

import pytest
import torch
from diffusers import (
    ControlNetModel,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch._dynamo.utils import counters

from perfusion.base import UnsupportedPipeline, cross_attention_layers, describe_base
from perfusion.editor import Editor, Tables, make_edit
from perfusion.handle import attach, detach
from perfusion.prompts import PromptError
from perfusion.text import TextHook, Word
from tests.perfusion.editing import check_rows, draw, hooks_of, make_concept, use, watch
from tests.perfusion.tiny import tiny_sd, tiny_sdxl

PROMPTS, PLAIN = ["a photo of a <teddy> on a beach", "a cat"], ["a photo of a teddy on a beach", "a cat"]


@pytest.fixture(scope="module")
def sd():
    pipe = tiny_sd()
    draw(pipe, "a cat")  # transformers sets hooks of its own at the first call
    return pipe


@pytest.fixture(scope="module")
def sdxl():
    pipe = tiny_sdxl()
    draw(pipe, "a cat")
    return pipe


@pytest.fixture(scope="module")
def teddy(sd):
    return make_concept(describe_base(sd), "teddy")


@pytest.fixture
def attached(sd, teddy):
    """The shared pipeline, attached, with <teddy>; a test that leaves a hook fails."""
    before, processors = hooks_of(sd.text_encoder), sd.unet.attn_processors
    with attach(sd) as handle:
        handle.load(teddy)
        yield handle
    assert hooks_of(sd.text_encoder) == before and not hooks_of(sd.unet)
    assert all(sd.unet.attn_processors[name] is processor for name, processor in processors.items())


@pytest.fixture
def fresh(teddy):
    """A pipeline of its own, attached, for tests that change its weights or modules."""
    pipe = tiny_sd()
    with attach(pipe) as handle:
        handle.load(teddy)
        yield pipe


def seen(pipe, prompt=None, **options):
    with watch(pipe.unet) as forwards:
        images = draw(pipe, prompt, **options)
    return images, forwards


# Every kind of pipeline

PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MASKS = (torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)) > 0.5).float()
FROM_PICTURES = dict(image=PICTURES, strength=1.0)
INTO_PICTURES = dict(image=PICTURES, mask_image=MASKS, strength=1.0, height=16, width=16)


def guided(t):
    return [[], [], t, []]


def unguided(t):
    return [t, []]


def perturbed(t):
    return [[], [], t, [], t, []]


def control_net(pipe):
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16))
    generator = torch.Generator().manual_seed(2)
    for parameter in net.parameters():  # its output layers start at zero
        parameter.data = parameter.data + 0.05 * torch.randn(parameter.shape, generator=generator)
    return StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=net.eval().requires_grad_(False))


CASES = {
    "text to image": ("sd", lambda pipe: pipe, {}, guided),
    "no guidance": ("sd", lambda pipe: pipe, dict(guidance_scale=1.0), unguided),
    "negative prompts": ("sd", lambda pipe: pipe, dict(negative_prompt=["bad", "dark"]), guided),
    "image to image": ("sd", StableDiffusionImg2ImgPipeline.from_pipe, FROM_PICTURES, guided),
    "inpaint": ("sd", StableDiffusionInpaintPipeline.from_pipe, INTO_PICTURES, guided),
    "controlnet": ("sd", control_net, dict(image=PICTURES), guided),
    "lcm": ("sd", lambda pipe: lcm(pipe), dict(guidance_scale=1.0), unguided),
    "pag": ("sd", lambda pipe: StableDiffusionPAGPipeline.from_pipe(pipe, pag_applied_layers=["mid"]), {}, perturbed),
    "xl": ("sdxl", lambda pipe: pipe, {}, guided),
    "xl no guidance": ("sdxl", lambda pipe: pipe, dict(guidance_scale=1.0), unguided),
    "xl image to image": ("sdxl", StableDiffusionXLImg2ImgPipeline.from_pipe, FROM_PICTURES, guided),
    "xl inpaint": ("sdxl", StableDiffusionXLInpaintPipeline.from_pipe, INTO_PICTURES, guided),
}


def lcm(pipe):
    pipe = StableDiffusionPipeline.from_pipe(pipe)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize("case", CASES)
def test_every_row_of_every_kind_of_pipeline(case, sd, sdxl):
    kind, build, options, rows = CASES[case]
    pipe = build(sd if kind == "sd" else sdxl)
    teddy = make_concept(describe_base(pipe), "teddy")
    plain, processors = draw(pipe, PLAIN, **options), pipe.unet.attn_processors
    with attach(pipe) as handle:
        handle.load(teddy)
        images, forwards = seen(pipe, PROMPTS, **options)
        assert len(forwards) == 2
        for forward in forwards:
            check_rows(pipe.unet, forward, rows([use(teddy)]))
        assert torch.equal(images[1], plain[1]) and not torch.allclose(images[0], plain[0], atol=1e-3)
        assert torch.equal(draw(pipe, PLAIN, **options), plain)
        assert torch.equal(draw(pipe, ["a photo of a <teddy:0> on a beach", "a cat"], **options), plain)
    assert torch.equal(draw(pipe, PLAIN, **options), plain)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in processors.items())
    assert not hooks_of(pipe.unet)


def test_sd2_predicts_v_and_has_another_width():
    pipe = tiny_sd(width=24, prediction_type="v_prediction", unet=dict(use_linear_projection=True))
    concept = make_concept(describe_base(pipe), "teddy")
    with attach(pipe) as handle:
        handle.load(concept)
        check_rows(pipe.unet, seen(pipe, PROMPTS)[1][1], guided([use(concept)]))


def test_bfloat16():
    pipe = tiny_sd(dtype=torch.bfloat16)
    concept, plain = make_concept(describe_base(pipe), "teddy"), draw(pipe, PLAIN)
    with attach(pipe) as handle:
        handle.load(concept)
        images, forwards = seen(pipe, PROMPTS)
        assert images.dtype == torch.bfloat16 and torch.equal(images[1], plain[1])
        check_rows(pipe.unet, forwards[0], guided([use(concept)]), tolerance=0.02)


# Prompts and batches


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


def test_prompt_and_negative_prompt_may_differ_in_settings_only(attached, sd, teddy):
    _, forwards = seen(sd, "a <teddy|bias=0.1>", negative_prompt="a <teddy|bias=0.9>")
    check_rows(sd.unet, forwards[0], [[use(teddy, bias=0.9)], [use(teddy, bias=0.1)]])


def test_the_second_encoder_of_xl_may_read_another_prompt(sdxl):
    teddy, pot = (make_concept(describe_base(sdxl), name, seed=seed) for seed, name in enumerate(("teddy", "teapot"), 1))
    with attach(sdxl) as handle:
        handle.load(teddy)
        handle.load(pot)
        _, forwards = seen(sdxl, "a <teddy>", prompt_2="a red <teapot>", negative_prompt="a <teapot>", negative_prompt_2="bad")
        check_rows(sdxl.unet, forwards[0], [[use(pot)], [use(teddy), use(pot)]])


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
    fresh.unet.set_default_attn_processor()
    expected = draw(fresh, PROMPTS)
    positive, negative = fresh.encode_prompt(PROMPTS, "cpu", 1, True)
    fresh.text_encoder = fresh.tokenizer = None
    assert torch.equal(draw(fresh, prompt_embeds=positive, negative_prompt_embeds=negative), expected)


def test_prompt_embeds_of_xl_given_directly(sdxl):
    teddy = make_concept(describe_base(sdxl), "teddy")
    with attach(sdxl) as handle:
        handle.load(teddy)
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        embeds = dict(zip(names, sdxl.encode_prompt(PROMPTS, device="cpu")))
        images, forwards = seen(sdxl, **embeds)
        check_rows(sdxl.unet, forwards[0], guided([use(teddy)]))
        assert torch.equal(images, draw(sdxl, PROMPTS))


def test_prompts_that_differ_in_settings_only_may_be_encoded_one_by_one(attached, sd, teddy):
    embeds = {bias: sd.encode_prompt(f"a <teddy|bias={bias}>", "cpu", 1, False)[0] for bias in (0.0, 0.5)}
    for bias, each in embeds.items():
        check_rows(sd.unet, seen(sd, prompt_embeds=each, guidance_scale=1.0)[1][0], [[use(teddy, bias=bias)]])


def test_a_callback_may_end_guidance(attached, sd, teddy):
    def cut(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": tensors["prompt_embeds"][-2:]}

    options = dict(callback_on_step_end=cut, callback_on_step_end_tensor_inputs=["prompt_embeds"], num_inference_steps=3)
    _, forwards = seen(sd, PROMPTS, **options)
    for forward, rows in zip(forwards, (guided, unguided, unguided), strict=True):
        check_rows(sd.unet, forward, rows([use(teddy)]))


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


def test_prompt_embeds_changed_in_place_between_calls_under_inference_mode(attached, sd, teddy):
    with torch.inference_mode():
        embeds, other = (sd.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in ("a <teddy>", "a cat"))
        check_rows(sd.unet, seen(sd, prompt_embeds=embeds, guidance_scale=1.0)[1][0], [[use(teddy)]])
        embeds.copy_(other)
        check_rows(sd.unet, seen(sd, prompt_embeds=embeds, guidance_scale=1.0)[1][0], [[]])


def test_nothing_is_kept_of_a_prompt_but_its_digest(attached, sd):
    edits = []
    own = attached._editor.edit_of

    def edit_of(encodings):
        edit = own(encodings)
        edits.append(weakref.ref(edit.value_updates))
        return edit

    attached._editor.edit_of = edit_of
    draw(sd, PROMPTS)
    assert len(edits) == 1 and edits[0]() is None


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


# What else users switch on


def test_attention_slicing_and_default_processors_on_and_off(attached, sd, teddy):
    before = sd.unet.attn_processors
    for change in (sd.enable_attention_slicing, sd.disable_attention_slicing, sd.unet.set_default_attn_processor):
        change()
        check_rows(sd.unet, seen(sd, PROMPTS)[1][0], guided([use(teddy)]))
    sd.unet.set_attn_processor(before)


def test_freeu(attached, sd, teddy):
    sd.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    check_rows(sd.unet, seen(sd, PROMPTS)[1][0], guided([use(teddy)]))
    sd.disable_freeu()


def lora(pipe, name="style", seed=3):
    """A LoRA on the text and image projections of a UNet that changes what it draws."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe.unet.add_adapter(config, name)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_reads_the_edited_input_fused_or_not(when, teddy):
    """Attention sees (W + ΔW) ẽ: what a model with the LoRA merged into its weights would give."""
    pipe = tiny_sd()
    if when == "before":
        lora(pipe)
    with attach(pipe) as handle:
        handle.load(teddy)
        without = draw(pipe, PROMPTS)
        if when == "after":
            lora(pipe)
            plain = draw(pipe, PLAIN)
            assert not torch.allclose(draw(pipe, PROMPTS), without, atol=1e-3)
        images, forwards = seen(pipe, PROMPTS)
        check_rows(pipe.unet, forwards[0], guided([use(teddy)]))
        pipe.fuse_lora()
        fused, forwards = seen(pipe, PROMPTS)
        check_rows(pipe.unet, forwards[0], guided([use(teddy)]))
        torch.testing.assert_close(fused, images, atol=1e-4, rtol=1e-3)
        pipe.unfuse_lora()
        torch.testing.assert_close(draw(pipe, PROMPTS), images, atol=1e-4, rtol=1e-3)
        if when == "after":
            torch.testing.assert_close(draw(pipe, PLAIN), plain, atol=1e-4, rtol=1e-3)
        pipe.unload_lora_weights()
        check_rows(pipe.unet, seen(pipe, PROMPTS)[1][0], guided([use(teddy)]))
    assert not hooks_of(pipe.unet)


def test_lora_from_a_file_comes_and_goes(fresh, teddy):
    expected, plain = draw(fresh, PROMPTS), draw(fresh, PLAIN)
    donor = tiny_sd()
    lora(donor)
    weights = {f"unet.{key}": value for key, value in get_peft_model_state_dict(donor.unet, adapter_name="style").items()}
    fresh.load_lora_weights(weights)
    assert not torch.allclose(draw(fresh, PLAIN), plain, atol=1e-3)
    check_rows(fresh.unet, seen(fresh, PROMPTS)[1][0], guided([use(teddy)]))
    fresh.unload_lora_weights()
    assert torch.equal(draw(fresh, PROMPTS), expected) and torch.equal(draw(fresh, PLAIN), plain)


def test_a_lora_that_is_there_at_detach_keeps_no_hook(teddy):
    pipe = tiny_sd()
    with attach(pipe) as handle:
        handle.load(teddy)
        lora(pipe)
        draw(pipe, PROMPTS)
    assert not hooks_of(pipe.unet)


def test_fused_projections_are_refused_by_name(fresh, teddy):
    plain = draw(fresh, PLAIN)
    fresh.unet.fuse_qkv_projections()
    torch.testing.assert_close(draw(fresh, PLAIN), plain, atol=1e-4, rtol=1e-3)  # without concepts it goes on as before
    with pytest.raises(UnsupportedPipeline, match=r"do not work with FusedAttnProcessor2_0, .*Call unet.unfuse_qkv_projections\(\) first"):
        draw(fresh, PROMPTS)
    fresh.unet.unfuse_qkv_projections()
    check_rows(fresh.unet, seen(fresh, PROMPTS)[1][0], guided([use(teddy)]))


def ip_adapter(pipe):
    """Weights of a random IP-Adapter in the layout of the published files."""
    generator = torch.Generator().manual_seed(4)
    width = 16
    weights = {"proj.weight": torch.randn(4 * width, 12, generator=generator), "proj.bias": torch.zeros(4 * width)}
    weights |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    layers = {}
    for number, layer in enumerate(cross_attention_layers(pipe.unet).values()):
        for kind in ("k", "v"):
            layers[f"{2 * number + 1}.to_{kind}_ip.weight"] = torch.randn(layer.to_v.out_features, width, generator=generator)
    return {"image_proj": weights, "ip_adapter": layers}


def test_an_ip_adapter_that_comes_later_is_refused_by_name(fresh, teddy):
    expected = draw(fresh, PROMPTS)
    fresh.unet._load_ip_adapter_weights([ip_adapter(fresh)])
    picture = dict(ip_adapter_image_embeds=[torch.randn(2, 1, 12)])
    draw(fresh, "a cat", **picture)
    with pytest.raises(UnsupportedPipeline, match=r"do not work with IPAdapterAttnProcessor2_0, .*Call pipe.unload_ip_adapter\(\) first"):
        draw(fresh, "a <teddy>", **picture)
    fresh.unload_ip_adapter()
    assert torch.equal(draw(fresh, PROMPTS), expected)


def test_model_offload(fresh, teddy):
    """accelerate's hooks on whole models, with the CPU as the device they execute on."""
    expected = draw(fresh, PROMPTS)
    fresh.enable_model_cpu_offload(device="cpu")
    images, forwards = seen(fresh, PROMPTS)
    check_rows(fresh.unet, forwards[0], guided([use(teddy)]))
    assert torch.equal(images, expected)
    fresh.remove_all_hooks()


def test_group_offload(fresh, teddy):
    expected = draw(fresh, PROMPTS)
    apply_group_offloading(fresh.unet, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level")
    images, forwards = seen(fresh, PROMPTS)
    check_rows(fresh.unet, forwards[0], guided([use(teddy)]))
    assert torch.equal(images, expected)


def test_layerwise_casting_stores_weights_in_float8(fresh, teddy):
    fresh.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    plain = draw(fresh, PLAIN)
    layer = next(iter(cross_attention_layers(fresh.unet).values()))
    assert layer.to_v.weight.dtype == torch.float8_e4m3fn
    images, forwards = seen(fresh, PROMPTS)
    assert torch.equal(images[1], plain[1]) and not torch.allclose(images[0], plain[0], atol=1e-3)
    rounded = tiny_sd().unet  # the same weights, rounded the same way, in a form that can be read
    for other, own in zip(cross_attention_layers(rounded).values(), cross_attention_layers(fresh.unet).values()):
        other.to_k.weight.data, other.to_v.weight.data = own.to_k.weight.float(), own.to_v.weight.float()
    check_rows(rounded, forwards[0], guided([use(teddy)]))


SMALL = dict(block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
             mid_block_type=None, attention_head_dim=2)  # fmt: skip


@pytest.mark.parametrize(
    "compile_unet",
    [
        lambda pipe: setattr(pipe, "unet", torch.compile(pipe.unet, backend="eager", fullgraph=True)),
        lambda pipe: pipe.unet.compile_repeated_blocks(backend="aot_eager", fullgraph=True),
    ],
    ids=["the UNet", "its repeated blocks"],
)
def test_compiled_after_attach(compile_unet):
    """One graph without an edit and one with: prompts and settings are data."""
    torch._dynamo.reset()
    counters.clear()
    pipe = tiny_sd(unet=SMALL)
    concept = make_concept(describe_base(pipe), "teddy")
    with attach(pipe) as handle:
        handle.load(concept)
        cases = [(PLAIN, 0.3), (PROMPTS, 0.3), (PROMPTS, 0.9), (["a dog", "<teddy:0.5> and a cat"], 0.9), (PLAIN, 0.9)]

        def images():
            for prompts, bias in cases:
                handle.set("teddy", bias=bias)
                yield draw(pipe, prompts, guidance_scale=1.0)

        embeds = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        expected = list(images())
        compile_unet(pipe)
        for got, image in zip(images(), expected, strict=True):
            torch.testing.assert_close(got, image, atol=1e-6, rtol=1e-5)
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    # what was compiled with the hooks does nothing any more
    after = draw(pipe, prompt_embeds=embeds, guidance_scale=1.0)
    torch.testing.assert_close(after, draw(tiny_sd(unet=SMALL), prompt_embeds=embeds, guidance_scale=1.0), atol=1e-6, rtol=1e-5)


def test_a_compiled_text_encoder(teddy):
    pipe = tiny_sd()
    with attach(pipe) as handle:
        handle.load(teddy)
        expected = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
        got = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        check_rows(pipe.unet, seen(pipe, prompt_embeds=got, guidance_scale=1.0)[1][0], unguided([use(teddy)]))


def test_saving_an_attached_pipeline_saves_the_plain_one(attached, sd, tmp_path):
    sd.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, PLAIN), draw(sd, PLAIN))


# Pipelines that share their parts


def test_a_pipeline_from_an_attached_one_reads_no_concepts_but_knows_their_encodings(attached, sd, teddy):
    other = StableDiffusionImg2ImgPipeline.from_pipe(sd)
    options = dict(image=PICTURES, strength=1.0)
    assert "encode_prompt" not in vars(other)
    embeds = sd.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    check_rows(sd.unet, seen(other, PLAIN, **options)[1][0], [[]] * 4)
    check_rows(sd.unet, seen(other, prompt_embeds=embeds, guidance_scale=1.0, **options)[1][0], unguided([use(teddy)]))


@pytest.mark.parametrize("first", [0, 1])
def test_pipelines_that_share_a_unet_are_attached_one_by_one(sd, teddy, first):
    """Both may know the very same prompt, and still it is edited once; they are detached in any order."""
    pipes = [StableDiffusionPipeline.from_pipe(sd), StableDiffusionPipeline.from_pipe(sd)]
    plain = draw(sd, PLAIN)
    pot = make_concept(describe_base(sd), "teapot", seed=2)
    handles = [attach(pipe) for pipe in pipes]
    handles[0].load(teddy)
    handles[1].load(teddy)
    handles[1].load(pot)
    with pytest.raises(PromptError, match="loaded are: <teddy>"):
        draw(pipes[0], "a <teapot>")
    for pipe in (*pipes, *pipes):
        check_rows(sd.unet, seen(pipe, PROMPTS)[1][0], guided([use(teddy)]))
        assert torch.equal(draw(pipe, PLAIN), plain)
    check_rows(sd.unet, seen(pipes[1], "a <teddy> in a <teapot>")[1][0], [[], [use(teddy), use(pot)]])
    detach(pipes[first])
    check_rows(sd.unet, seen(pipes[1 - first], PROMPTS)[1][0], guided([use(teddy)]))
    detach(pipes[1 - first])
    assert not hooks_of(sd.unet) and torch.equal(draw(sd, PLAIN), plain)


# Training through the pipeline's parts


def test_gradients_reach_the_word_through_encoder_and_checkpointed_unet(fresh):
    """What training does: encode_prompt through the hook, the edit from it, the UNet with gradient checkpointing."""
    detach(fresh)
    concept = make_concept(describe_base(fresh), "teddy")
    noise, latents = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(6))

    def gradients(checkpointing):
        word, outputs = concept.word_embeddings[0].clone().requires_grad_(), concept.value_outputs.clone().requires_grad_()
        text, editor = TextHook(fresh, {"thing": Word("teddy", [word])}), Editor(fresh.unet, lambda encodings: None)
        text.install()
        editor.install()
        fresh.unet.train(checkpointing)
        (fresh.unet.enable_gradient_checkpointing if checkpointing else fresh.unet.disable_gradient_checkpointing)()
        encodings = fresh.encode_prompt("a photo of a <thing>", "cpu", 1, False)[0]
        tables = Tables(concept.target[None], concept.metric_target[None], concept.superclass_encoding[None], outputs[None])
        ones = torch.ones(1, 1)
        edit = make_edit(encodings, torch.tensor([0]), tables, torch.zeros(1, 1, dtype=torch.int32), 0.75 * ones, 0.1 * ones, ones)
        editor.use(encodings, edit)
        loss = (fresh.unet(latents, 300, encoder_hidden_states=encodings).sample - noise).square().mean()
        loss.backward()
        editor.remove()
        text.remove()
        fresh.unet.disable_gradient_checkpointing()
        fresh.unet.eval()
        return loss.detach(), word.grad, outputs.grad

    plain, checkpointed = gradients(False), gradients(True)
    assert all(gradient.abs().sum() > 0 for gradient in plain)
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-5)
    attach(fresh)
