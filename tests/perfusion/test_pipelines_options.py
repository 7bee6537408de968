"""The hook in diffusers' pipelines: what else users switch on."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.hooks import apply_group_offloading
from peft.utils import get_peft_model_state_dict
from torch._dynamo.utils import counters

from perfusion.base import UnsupportedPipeline, cross_attention_layers, describe_base
from perfusion.handle import attach
from tests.kernels.tolerance import as_run, assert_same_run
from tests.perfusion.editing import PLAIN, PROMPTS, check_rows, draw, guided, hooks_of, lora, make_concept, seen, unguided, use
from tests.perfusion.pipeline_matrix import ip_adapter
from tests.perfusion.tiny import SMALL, tiny_sd

pytestmark = pytest.mark.pipelines


@pytest.mark.numeric
def test_attention_slicing_and_default_processors_on_and_off(attached, sd, teddy):
    before = sd.unet.attn_processors
    for change in (sd.enable_attention_slicing, sd.disable_attention_slicing, sd.unet.set_default_attn_processor):
        change()
        check_rows(sd.unet, seen(sd, PROMPTS)[1][0], guided([use(teddy)]))
    sd.unet.set_attn_processor(before)


@pytest.mark.numeric
def test_freeu(attached, sd, teddy):
    sd.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    check_rows(sd.unet, seen(sd, PROMPTS)[1][0], guided([use(teddy)]))
    sd.disable_freeu()


@pytest.mark.numeric
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
            plain = as_run(lambda: draw(pipe, PLAIN))
            assert not torch.allclose(draw(pipe, PROMPTS), without, atol=1e-3)
        images = as_run(lambda: draw(pipe, PROMPTS))
        check_rows(pipe.unet, seen(pipe, PROMPTS)[1][0], guided([use(teddy)]))
        pipe.fuse_lora()
        fused, forwards = seen(pipe, PROMPTS)
        check_rows(pipe.unet, forwards[0], guided([use(teddy)]))
        assert_same_run(fused, images)
        pipe.unfuse_lora()
        assert_same_run(draw(pipe, PROMPTS), images)
        if when == "after":
            assert_same_run(draw(pipe, PLAIN), plain)
        pipe.unload_lora_weights()
        check_rows(pipe.unet, seen(pipe, PROMPTS)[1][0], guided([use(teddy)]))
    assert not hooks_of(pipe.unet)


@pytest.mark.numeric
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


@pytest.mark.numeric
def test_fused_projections_are_refused_by_name(fresh, teddy):
    plain = as_run(lambda: draw(fresh, PLAIN))
    fresh.unet.fuse_qkv_projections()
    assert_same_run(draw(fresh, PLAIN), plain)  # without concepts it goes on as before
    with pytest.raises(UnsupportedPipeline, match=r"do not work with FusedAttnProcessor2_0, .*Call unet.unfuse_qkv_projections\(\) first"):
        draw(fresh, PROMPTS)
    fresh.unet.unfuse_qkv_projections()
    check_rows(fresh.unet, seen(fresh, PROMPTS)[1][0], guided([use(teddy)]))


@pytest.mark.numeric
def test_an_ip_adapter_comes_and_goes(fresh, teddy):
    """It needs the processors, so its runs take the compatibility path; the text that keys and values read is edited all the same."""
    expected = as_run(lambda: draw(fresh, PROMPTS))
    ip_adapter(fresh)
    picture = dict(ip_adapter_image_embeds=[torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(6))])
    with pytest.warns(UserWarning, match="was given another processor, IPAdapterAttnProcessor2_0"):
        _, forwards = seen(fresh, PROMPTS, **picture)
    check_rows(fresh.unet, forwards[0], guided([use(teddy)]))
    fresh.unload_ip_adapter()
    assert_same_run(draw(fresh, PROMPTS), expected)


@pytest.mark.numeric
def test_model_offload(fresh, teddy):
    """accelerate's hooks on whole models, with the CPU as the device they execute on."""
    expected = draw(fresh, PROMPTS)
    fresh.enable_model_cpu_offload(device="cpu")
    images, forwards = seen(fresh, PROMPTS)
    check_rows(fresh.unet, forwards[0], guided([use(teddy)]))
    assert torch.equal(images, expected)
    fresh.remove_all_hooks()


@pytest.mark.numeric
def test_group_offload(fresh, teddy):
    expected = as_run(lambda: draw(fresh, PROMPTS))
    apply_group_offloading(fresh.unet, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level")
    images, forwards = seen(fresh, PROMPTS)
    check_rows(fresh.unet, forwards[0], guided([use(teddy)]))
    assert_same_run(images, expected)  # projections are called one by one: another order of the sums


@pytest.mark.numeric
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


@pytest.mark.numeric
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

        def drawn(prompts, bias):
            handle.set("teddy", bias=bias)
            return draw(pipe, prompts, guidance_scale=1.0)

        embeds = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        expected = [as_run(lambda: drawn(*case)) for case in cases]
        compile_unet(pipe)
        for case, image in zip(cases, expected):
            assert_same_run(drawn(*case), image)
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    # what was compiled with the hooks does nothing any more
    plain = tiny_sd(unet=SMALL)
    options = dict(prompt_embeds=embeds, guidance_scale=1.0)
    assert_same_run(draw(pipe, **options), as_run(lambda: draw(plain, **options)))


@pytest.mark.numeric
def test_a_compiled_text_encoder(teddy):
    pipe = tiny_sd()
    with attach(pipe) as handle:
        handle.load(teddy)
        expected = as_run(lambda: pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0])
        pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
        got = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        assert_same_run(got, expected)
        check_rows(pipe.unet, seen(pipe, prompt_embeds=got, guidance_scale=1.0)[1][0], unguided([use(teddy)]))


def test_saving_an_attached_pipeline_saves_the_plain_one(attached, sd, tmp_path):
    sd.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, PLAIN), draw(sd, PLAIN))
