"""The hook in diffusers' pipelines: what every row of every kind sees in attention, and what stays bit-equal."""

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

from perfusion.base import describe_base
from perfusion.edit import RowSettings, Tables
from perfusion.handle import attach, detach
from perfusion.loaded_concept import LoadedConcept
from perfusion.projection_hooks import ProjectionHooks, hook_edit
from perfusion.prompts import PromptError
from perfusion.text import TextHook
from tests.kernels.tolerance import as_run, assert_same_run
from tests.perfusion.editing import (
    PLAIN,
    PROMPTS,
    check_rows,
    draw,
    guided,
    hooks_of,
    make_concept,
    seen,
    unguided,
    use,
)
from tests.perfusion.tiny import tiny_sd

pytestmark = pytest.mark.models

# Every kind of pipeline

PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MASKS = (torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)) > 0.5).float()
FROM_PICTURES = dict(image=PICTURES, strength=1.0)
INTO_PICTURES = dict(image=PICTURES, mask_image=MASKS, strength=1.0, height=16, width=16)


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


@pytest.mark.numeric
@pytest.mark.parametrize("case", CASES)
def test_every_row_of_every_kind_of_pipeline(case, sd, sdxl):
    kind, build, options, rows = CASES[case]
    pipe = build(sd if kind == "sd" else sdxl)
    teddy = make_concept(describe_base(pipe), "teddy")
    plain, processors = draw(pipe, PLAIN, **options), pipe.unet.attn_processors
    without_concept = as_run(lambda: draw(pipe, PLAIN, **options)[1])
    with attach(pipe) as handle:
        handle.load(teddy)
        images, forwards = seen(pipe, PROMPTS, **options)
        assert len(forwards) == 2
        for forward in forwards:
            check_rows(pipe.unet, forward, rows([use(teddy)]))
        assert_same_run(images[1], without_concept)
        assert not torch.allclose(images[0], plain[0], atol=1e-3)
        assert torch.equal(draw(pipe, PLAIN, **options), plain)
        assert torch.equal(draw(pipe, ["a photo of a <teddy:0> on a beach", "a cat"], **options), plain)
    assert torch.equal(draw(pipe, PLAIN, **options), plain)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in processors.items())
    assert not hooks_of(pipe.unet)


@pytest.mark.numeric
def test_sd2_predicts_v_and_has_another_width():
    pipe = tiny_sd(width=24, prediction_type="v_prediction", unet=dict(use_linear_projection=True))
    concept = make_concept(describe_base(pipe), "teddy")
    with attach(pipe) as handle:
        handle.load(concept)
        check_rows(pipe.unet, seen(pipe, PROMPTS)[1][1], guided([use(concept)]))


@pytest.mark.numeric
def test_bfloat16():
    pipe = tiny_sd(dtype=torch.bfloat16)
    concept, plain = make_concept(describe_base(pipe), "teddy"), draw(pipe, PLAIN)
    with attach(pipe) as handle:
        handle.load(concept)
        images, forwards = seen(pipe, PROMPTS)
        assert images.dtype == torch.bfloat16 and torch.equal(images[1], plain[1])
        check_rows(pipe.unet, forwards[0], guided([use(concept)]), roundings=4)


# Pipelines that share their parts


@pytest.mark.numeric
def test_a_pipeline_from_an_attached_one_reads_no_concepts_but_knows_their_encodings(attached, sd, teddy):
    other = StableDiffusionImg2ImgPipeline.from_pipe(sd)
    options = dict(image=PICTURES, strength=1.0)
    assert "encode_prompt" not in vars(other)
    embeds = sd.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    check_rows(sd.unet, seen(other, PLAIN, **options)[1][0], [[]] * 4)
    check_rows(sd.unet, seen(other, prompt_embeds=embeds, guidance_scale=1.0, **options)[1][0], unguided([use(teddy)]))


@pytest.mark.numeric
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
        text, editor = TextHook(fresh, {"thing": LoadedConcept("teddy", [word])}), ProjectionHooks(fresh.unet, lambda encodings: None)
        text.install()
        editor.install()
        fresh.unet.train(checkpointing)
        (fresh.unet.enable_gradient_checkpointing if checkpointing else fresh.unet.disable_gradient_checkpointing)()
        encodings = fresh.encode_prompt("a photo of a <thing>", "cpu", 1, False)[0]
        tables = Tables(concept.target[None], concept.metric_target[None], concept.superclass_encoding[None], outputs[None])
        ones = torch.ones(1, 1)
        settings = RowSettings(torch.zeros(1, 1, dtype=torch.int32), 0.75 * ones, 0.1 * ones, ones)
        edit = hook_edit(encodings, torch.tensor([0]), tables, settings)
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
    assert all(map(torch.equal, plain, checkpointed))  # the same sums, in the same order
    attach(fresh)
