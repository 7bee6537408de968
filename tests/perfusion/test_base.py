"""perfusion.base: the parts of a pipeline, its fingerprint, and what is refused."""

import dataclasses

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from perfusion.base import (
    Base,
    UnsupportedPipeline,
    check_supported,
    cross_attention_layers,
    describe_base,
    fingerprints_match,
    layer_width,
    text_encoder_fingerprint,
    text_encoders,
)
from tests.perfusion.tiny import tiny_sd, tiny_sdxl

ATTENTION = "attentions.0.transformer_blocks.0.attn2"
SD_LAYERS = {
    f"down_blocks.0.{ATTENTION}": 8,
    f"up_blocks.1.{ATTENTION}": 8,
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2": 8,
    f"mid_block.{ATTENTION}": 16,
}


@pytest.fixture
def sd():
    return tiny_sd()


@pytest.fixture
def sdxl():
    return tiny_sdxl()


def clip(width=64, layers=2, seed=0, vocabulary=600):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPTextConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_attention_heads=2,
                                num_hidden_layers=layers, projection_dim=width)  # fmt: skip
        return CLIPTextModel(config)


class Holder:
    """A pipeline that has only what a test gives it."""

    def __init__(self, **parts):
        self.__dict__.update(parts)


def fingerprint_of(encoder):
    return text_encoder_fingerprint(Holder(text_encoder=encoder, tokenizer=object()))


# Parts


def test_layers_are_named_in_module_order_with_widths(sd):
    layers = cross_attention_layers(sd.unet)
    assert {name: layer_width(layer) for name, layer in layers.items()} == SD_LAYERS
    assert list(layers) == list(SD_LAYERS)
    assert [f"{name}.processor" for name in layers] == [n for n in sd.unet.attn_processors if "attn2" in n]


def test_layers_of_a_compiled_unet_keep_their_names(sd):
    compiled = torch.compile(sd.unet, backend="eager")
    assert list(cross_attention_layers(compiled)) == list(SD_LAYERS)
    sd.unet.mid_block = torch.compile(sd.unet.mid_block, backend="eager")
    assert list(cross_attention_layers(sd.unet)) == list(SD_LAYERS)
    sd.unet = torch.compile(sd.unet, backend="eager")
    assert dict(describe_base(sd).layers) == SD_LAYERS


def test_layer_width_looks_below_lora(sd):
    layer = next(iter(cross_attention_layers(sd.unet).values()))
    wrapped = torch.nn.Module()
    wrapped.base_layer, wrapped.out_features = layer.to_v, None
    layer.to_v = wrapped
    assert layer_width(layer) == 8


def test_text_encoders_come_in_concatenation_order(sd, sdxl):
    assert text_encoders(sd) == [(sd.tokenizer, sd.text_encoder)]
    assert text_encoders(sdxl) == [(sdxl.tokenizer, sdxl.text_encoder), (sdxl.tokenizer_2, sdxl.text_encoder_2)]


def test_missing_text_encoder_or_tokenizer_is_refused(sd):
    sd.tokenizer = None
    with pytest.raises(UnsupportedPipeline, match="no tokenizer"):
        text_encoders(sd)
    sd.text_encoder = None
    with pytest.raises(UnsupportedPipeline, match="no text encoder .*load the pipeline with its text encoder"):
        check_supported(sd)


# Fingerprint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_fingerprint_survives_precision(dtype):
    encoder = clip()
    before = fingerprint_of(encoder)
    for parameter in encoder.parameters():
        parameter.data = parameter.data.to(dtype)
    assert fingerprints_match(before, fingerprint_of(encoder))


def test_fingerprint_tells_unrelated_encoders_apart():
    prints = [fingerprint_of(clip(seed=seed)) for seed in range(12)]
    for i, a in enumerate(prints):
        for j, b in enumerate(prints):
            assert fingerprints_match(a, b) == (i == j)


def test_fingerprint_survives_a_light_fine_tune_and_not_a_heavy_one():
    encoder = clip()
    before = fingerprint_of(encoder)
    for share, same in ((0.05, True), (0.2, True), (3.0, False)):
        tuned = clip()
        for parameter in tuned.parameters():
            parameter.data += share * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        assert fingerprints_match(before, fingerprint_of(tuned)) is same, share


def test_fingerprint_ignores_added_tokens_and_compilation():
    encoder = clip()
    before = fingerprint_of(encoder)
    encoder.resize_token_embeddings(700)
    assert fingerprint_of(encoder) == before
    assert fingerprint_of(torch.compile(encoder, backend="eager")) == before


def test_fingerprint_is_portable():
    """The same weights give these very characters on every machine: the projection owes nothing to a random generator."""
    encoder = clip(width=8)
    for parameter in encoder.parameters():
        parameter.data = torch.arange(parameter.numel()).remainder(7).sub(3).reshape(parameter.shape).float()
    assert fingerprint_of(encoder) == "5gfpGPUG9QAPCQLX7eXB3F0E+QjZP/Q2fxQ0DuzH2P4="


def test_fingerprint_has_one_part_per_encoder(sd, sdxl):
    one, two = text_encoder_fingerprint(sd), text_encoder_fingerprint(sdxl)
    assert len(one) == 44 and len(two) == 89
    assert not fingerprints_match(one, two)
    assert fingerprints_match(two, text_encoder_fingerprint(tiny_sdxl(dtype=torch.bfloat16)))


def test_fingerprint_of_offloaded_weights_is_refused():
    with pytest.raises(UnsupportedPipeline, match="offloaded .*before enable_sequential_cpu_offload"):
        fingerprint_of(clip().to("meta"))


def test_fingerprint_of_an_encoder_without_mlp_is_refused():
    encoder = torch.nn.Sequential(torch.nn.Embedding(4, 4))
    encoder.get_input_embeddings = lambda: encoder[0]
    with pytest.raises(UnsupportedPipeline, match="no layer called 'mlp'"):
        fingerprint_of(encoder)


@pytest.mark.parametrize("text", ["", "abc", "AAAA", "é" * 44, "A" * 44 + "."])
def test_text_that_is_no_fingerprint_is_refused(text):
    with pytest.raises(ValueError, match="not a text encoder fingerprint"):
        fingerprints_match(text, text)


def test_an_all_zero_fingerprint_matches_nothing():
    zero = "A" * 43 + "="
    assert not fingerprints_match(zero, zero)


# Base


def test_describe_base(sd, sdxl):
    base = describe_base(sd)
    assert (base.family, base.encoding_dim, base.text_widths, base.outputs) == ("custom", 16, (16,), 40)
    assert dict(base.layers) == SD_LAYERS
    assert [base.slices[name] for name in SD_LAYERS] == [slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 40)]
    assert str(base) == "a custom model (text width 16, 4 cross-attention layers, 40 outputs)"
    xl = describe_base(sdxl)
    assert (xl.encoding_dim, xl.text_widths, xl.outputs) == (40, (16, 24), 128)
    assert base == describe_base(sd) and base != xl


@pytest.mark.parametrize(
    "widths, family, name",
    [
        ((768,), "sd1", "Stable Diffusion 1.x (text width 768,"),
        ((1024,), "sd2", "Stable Diffusion 2.x (text width 1024,"),
        ((768, 1280), "sdxl", "Stable Diffusion XL (text width 768 + 1280,"),
        ((2048,), "custom", "a custom model (text width 2048,"),
    ],
)
def test_family_follows_the_text_widths(widths, family, name):
    fingerprint = ".".join(["B" * 43 + "="] * len(widths))
    base = Base(family, sum(widths), widths, {"layer": 4}, fingerprint)
    assert str(base).startswith(name)
    with pytest.raises(ValueError, match=f"family must be '{family}'"):
        dataclasses.replace(base, family="sd9")
    if family != "custom":
        with pytest.raises(ValueError, match="family must be 'custom' for"):
            dataclasses.replace(base, encoding_dim=sum(widths) + 1)
    with pytest.raises(ValueError, match="encoding_dim and text_widths must be positive"):
        dataclasses.replace(base, encoding_dim=0)
    with pytest.raises(ValueError, match="at least one layer"):
        dataclasses.replace(base, layers={})
    with pytest.raises(ValueError, match="one fingerprint for each"):
        dataclasses.replace(base, text_encoder=fingerprint + "." + fingerprint)


def test_mismatch_names_both_bases_and_the_reason(sd, sdxl):
    base, xl = describe_base(sd), describe_base(sdxl)
    assert base.mismatch(describe_base(tiny_sd(dtype=torch.float16))) is None
    message = base.mismatch(xl)
    assert message == f"made for {base}, but this is {xl}: the text encoders have other widths."
    shorter = dataclasses.replace(base, layers=dict(list(SD_LAYERS.items())[:3]))
    assert base.mismatch(shorter).endswith(f": it lacks layer mid_block.{ATTENTION}.")
    assert shorter.mismatch(base).endswith(f": it has layer mid_block.{ATTENTION} in addition.")
    shortest = dataclasses.replace(base, layers=dict(list(SD_LAYERS.items())[:1]))
    assert base.mismatch(shortest).endswith(f": it lacks layer up_blocks.1.{ATTENTION} and 2 more.")
    wider = dataclasses.replace(base, layers={**SD_LAYERS, f"mid_block.{ATTENTION}": 32})
    assert "is 32 wide, not 16" in base.mismatch(wider)
    turned = dataclasses.replace(base, layers=dict(reversed(SD_LAYERS.items())))
    assert "another order" in base.mismatch(turned)
    assert "text encoder's weights are not the ones" in base.mismatch(describe_base(tiny_sd(seed=1)))


# Refusals


def test_what_is_supported_passes(sd, sdxl):
    check_supported(sd)
    check_supported(sdxl)


def test_joint_attention_transformers_are_refused_by_name():
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
                                             joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4))  # fmt: skip
    with pytest.raises(UnsupportedPipeline, match=r"FluxTransformer2DModel.*joint attention.*Supported are .*1\.x, 2\.x and XL"):
        check_supported(Holder(transformer=transformer))


def test_pipelines_without_a_text_unet_are_refused(sd):
    with pytest.raises(UnsupportedPipeline, match="has no UNet"):
        check_supported(Holder(vae=sd.vae))
    with pytest.raises(UnsupportedPipeline, match="its UNet is of type AutoencoderKL"):
        check_supported(Holder(unet=sd.vae))


@pytest.mark.parametrize("field, value", [("addition_embed_type", "image"), ("encoder_hid_dim_type", "text_image_proj")])
def test_other_conditioning_is_refused_by_its_setting(sd, field, value):
    sd.unet.register_to_config(**{field: value})
    with pytest.raises(UnsupportedPipeline, match=f"{field}='{value}'"):
        check_supported(sd)


def test_added_key_value_projections_are_refused(sd):
    sd.unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    with pytest.raises(UnsupportedPipeline, match="added key and value projections .*AddedKV.*DeepFloyd"):
        check_supported(sd)


def test_fused_projections_are_refused_and_pass_when_undone(sd):
    sd.fuse_qkv_projections(vae=False)
    with pytest.raises(UnsupportedPipeline, match=r"fused .*FusedAttnProcessor.*unfuse_qkv_projections\(\)"):
        check_supported(sd)
    sd.unfuse_qkv_projections(vae=False)
    check_supported(sd)


def test_a_unet_that_reads_another_width_is_refused(sdxl):
    sdxl.text_encoder_2 = sdxl.tokenizer_2 = None
    with pytest.raises(UnsupportedPipeline, match=r"give 16 numbers per token, its UNet reads 40\. Is a text encoder missing"):
        check_supported(sdxl)
