"""Every pipeline and option that concepts are to work with, each as one case; `docs/pipelines.md` lists what came out.

    python -m tests.perfusion.pipeline_matrix      writes the tables of the page anew, in a minute or two

A case is drawn three times over, by pipelines of equal random weights: by one that never saw perfusion, by one that is
attached, and by one that is attached with exact=True, whose hooks share nothing with the fast path but the edit itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from perfusion.base import cross_attention_layers, denoiser, describe_base
from perfusion.engine import engine_of
from perfusion.handle import Handle, attach, detach
from tests.perfusion.editing import PLAIN, PROMPTS, make_concept
from tests.perfusion.tiny import tiny_kolors, tiny_pixart, tiny_sd, tiny_sdxl, tiny_sdxl_modular

PAGE = Path(__file__).parents[2] / "docs/pipelines.md"
PICTURE = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MASK = (torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)) > 0.5).float()


@dataclasses.dataclass(frozen=True)
class Case:
    """name: its row of the page. build: a fresh pipeline, equal at every call. options: of the pipeline's call.

    change(pipe, handle): what the user does to the pipeline, after attach unless `before`; handle is None without perfusion.
    prompts(pipe, texts): the call's arguments that stand for two texts. around: a context in which all is drawn.
    tolerance: between the two paths and between rows, as a part of the largest number. neutral: whether it changes no number,
    so that it draws what the first case of the same build does. needs: a package that is not there everywhere.
    """

    name: str
    build: Callable[[], Any] = tiny_sd
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    change: Callable[[Any, Handle | None], None] = lambda pipe, handle: None
    before: bool = False
    prompts: Callable[[Any, list[str]], dict[str, Any]] = lambda pipe, texts: {"prompt": texts}
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    tolerance: float = 1e-4
    neutral: bool = False
    needs: str | None = None

    def draw(self, pipe: Any, texts: list[str]) -> Tensor:
        """Latents of two steps, the same noise at every call."""
        options = dict(num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(5)) | self.options
        with self.around():
            given = self.prompts(pipe, texts)
            result = pipe(**given, **options)
        if isinstance(pipe, diffusers.ModularPipeline):
            return result.values["images"].float()
        return (result.frames if hasattr(result, "frames") else result.images).float()

    def start(self, exact: bool = False) -> tuple[Any, Handle]:
        """A pipeline with <teddy>, changed as the case says."""
        pipe = self.build()
        if self.before:
            self.change(pipe, None)
        handle = attach(pipe, exact=exact)
        handle.load(concept_of(pipe))
        if not self.before:
            self.change(pipe, handle)
        return pipe, handle


def concept_of(pipe: Any):
    return make_concept(describe_base(pipe, text_required=False), "teddy")


@dataclasses.dataclass
class Outcome:
    """The forms of the engine that a case took, and what it drew: latents of the texts without a concept and with one."""

    path: str
    untouched: Tensor  # a pipeline that never saw perfusion
    plain: Tensor  # attached, no row with a concept
    mixed: Tensor  # attached, the first text with a concept
    exact: Tensor  # the same by exact=True
    after: Tensor  # detached, no concept
    leftovers: list[str]  # hooks and processors of perfusion that are there after detach


def run(case: Case) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = case.build()
        case.change(twin, None)
        untouched = case.draw(twin, PLAIN)
        pipe, handle = case.start()
        engine = engine_of(denoiser(pipe))
        engine.counts.update(dict.fromkeys(engine.counts, 0))
        plain = case.draw(pipe, PLAIN)
        assert {form for form, count in engine.counts.items() if count} <= {"stock"}, "no row has a concept, yet something is edited"
        engine.counts.update(stock=0)
        mixed = case.draw(pipe, PROMPTS)
        # guiders run the negative prompt by itself, and forwards without a concept are the pipeline's own
        path = " + ".join(form for form, count in engine.counts.items() if count and form != "stock") or "stock"
        detach(pipe)
        after = case.draw(pipe, PLAIN)
        reference, _ = case.start(exact=True)
        return Outcome(path, untouched, plain, mixed, case.draw(reference, PROMPTS), after, leftovers(pipe))


@functools.cache
def drawn_plainly(build: Callable[[], Any]) -> Tensor:
    """What a concept gives with none of the options."""
    return run(next(case for case in PIPELINES if case.build is build)).mixed


def leftovers(pipe: Any) -> list[str]:
    """What perfusion left in a pipeline."""
    blocks = getattr(pipe, "_blocks", None) or getattr(pipe, "blocks", None)
    owners = [*blocks.sub_blocks.values()] if blocks else [pipe]
    found = [name for owner in owners for name in ("encode_prompt", "_encode_prompt") if name in vars(owner)]
    for part in (denoiser(pipe), pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        for name, module in () if part is None else part.named_modules():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), getattr(module, "processor", None)]
            found += [f"{name}: {hook}" for hook in hooks if _module_of(hook).startswith("perfusion")]
    return found


def _module_of(hook: Any) -> str:
    hook = hook.func if isinstance(hook, functools.partial) else hook
    return getattr(hook, "__module__", None) or type(hook).__module__


# pipelines


def derived(name: str, build: Callable[[], Any] = tiny_sd, **parts: Any) -> Callable[[], Any]:
    """A pipeline class of diffusers around the parts of a tiny pipeline."""
    return lambda: getattr(diffusers, name).from_pipe(build(), **{key: make() for key, make in parts.items()})


def seeded(make: Callable[[], torch.nn.Module], noise: float = 0.05) -> torch.nn.Module:
    """A module of random weights, also where its own initialisation gives zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        module = make().eval().requires_grad_(False)
        for parameter in module.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return module


def controlnet(build: Callable[[], Any], name: str) -> Callable[[], Any]:
    def make() -> Any:
        pipe = build()
        net = seeded(lambda: diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16)))
        return getattr(diffusers, name).from_pipe(pipe, controlnet=net)

    return make


def t2i_adapter() -> torch.nn.Module:
    return seeded(
        lambda: diffusers.T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    )


def instruct_pix2pix() -> Any:
    base = tiny_sd(unet=dict(in_channels=8))
    parts = {name: base.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def refiner() -> Any:
    base = tiny_sdxl()
    parts = {name: base.components[name] for name in ("vae", "text_encoder_2", "tokenizer_2", "scheduler")}
    unet = tiny_sdxl(widths=(8, 16), unet=dict(projection_class_embeddings_input_dim=5 * 4 + 12)).unet  # it reads one encoder, 24 wide
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts, unet=unet, text_encoder=None, tokenizer=None, requires_aesthetics_score=True, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lcm(name: str) -> Callable[[], Any]:
    def make() -> Any:
        base = tiny_sd(unet=dict(time_cond_proj_dim=8))
        parts = {each: base.components[each] for each in ("vae", "text_encoder", "tokenizer", "unet")}
        pipe = getattr(diffusers, name)(
            **parts,
            scheduler=diffusers.LCMScheduler.from_config(base.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def animatediff() -> Any:
    base = tiny_sd(unet=dict(attention_head_dim=2))
    adapter = seeded(
        lambda: diffusers.MotionAdapter(
            block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4
        )
    )
    parts = {name: base.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    pipe = diffusers.AnimateDiffPipeline(**parts, motion_adapter=adapter)
    pipe.unet.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modular(guider: str, **options: Any) -> Any:
    """The blocks of SDXL with one of diffusers' guiders, as a pipeline."""
    if options.pop("layers", False):
        where = diffusers.hooks.LayerSkipConfig(indices=[0], fqn="mid_block.attentions.0.transformer_blocks", **options.pop("skip"))
        options[next(name for name in LAYERS if name in inspect.signature(getattr(diffusers.guiders, guider)).parameters)] = where
    return tiny_sdxl_modular(getattr(diffusers.guiders, guider)(**options))


LAYERS = ("perturbed_guidance_config", "skip_layer_config", "auto_guidance_config")
SKIP = dict(layers=True, skip=dict(skip_attention=False, skip_attention_scores=True, skip_ff=False))
GUIDERS = {
    "ClassifierFreeGuidance": dict(guidance_scale=5.0),
    "ClassifierFreeZeroStarGuidance": dict(guidance_scale=5.0),
    "AdaptiveProjectedGuidance": dict(guidance_scale=5.0),
    "TangentialClassifierFreeGuidance": dict(guidance_scale=5.0),
    "PerturbedAttentionGuidance": dict(guidance_scale=5.0, perturbed_guidance_stop=1.0, **SKIP),
}
GLM = dict(max_sequence_length=24)
PIXART = dict(use_resolution_binning=False, max_sequence_length=24, clean_caption=False)
FROM = dict(image=PICTURE, strength=1.0)
INTO = dict(image=PICTURE, mask_image=MASK, strength=1.0, height=16, width=16)
pag = functools.partial(lambda name, build: lambda: getattr(diffusers, name).from_pipe(build(), pag_applied_layers=["mid"]))

PIPELINES = [
    Case("StableDiffusionPipeline"),
    Case("StableDiffusionImg2ImgPipeline", derived("StableDiffusionImg2ImgPipeline"), FROM),
    Case("StableDiffusionInpaintPipeline", derived("StableDiffusionInpaintPipeline"), INTO),
    Case("StableDiffusionControlNetPipeline", controlnet(tiny_sd, "StableDiffusionControlNetPipeline"), dict(image=PICTURE)),
    Case(
        "StableDiffusionControlNetPipeline, guess mode",
        controlnet(tiny_sd, "StableDiffusionControlNetPipeline"),
        dict(image=PICTURE, guess_mode=True),
    ),
    Case("StableDiffusionAdapterPipeline", derived("StableDiffusionAdapterPipeline", adapter=t2i_adapter), dict(image=PICTURE)),
    Case("StableDiffusionInstructPix2PixPipeline", instruct_pix2pix, dict(image=PICTURE)),
    Case("StableDiffusionPAGPipeline", pag("StableDiffusionPAGPipeline", tiny_sd)),
    Case("LatentConsistencyModelPipeline", lcm("LatentConsistencyModelPipeline")),
    Case("LatentConsistencyModelImg2ImgPipeline", lcm("LatentConsistencyModelImg2ImgPipeline"), FROM),
    Case("AnimateDiffPipeline", animatediff, dict(num_frames=2, height=16, width=16)),
    Case("StableDiffusionXLPipeline", tiny_sdxl),
    Case("StableDiffusionXLImg2ImgPipeline", derived("StableDiffusionXLImg2ImgPipeline", tiny_sdxl), FROM),
    Case("StableDiffusionXLInpaintPipeline", derived("StableDiffusionXLInpaintPipeline", tiny_sdxl), INTO),
    Case("StableDiffusionXLImg2ImgPipeline, refiner", refiner, FROM),
    Case("StableDiffusionXLPAGPipeline", pag("StableDiffusionXLPAGPipeline", tiny_sdxl)),
    Case("KolorsPipeline", tiny_kolors, GLM, needs="sentencepiece"),
    Case("PixArtAlphaPipeline", functools.partial(tiny_pixart, diffusers.PixArtAlphaPipeline), PIXART),
    Case("PixArtSigmaPipeline", tiny_pixart, PIXART),
    *(
        Case(f"StableDiffusionXLModularPipeline, {name}", functools.partial(modular, name, **options), dict(num_inference_steps=3))
        for name, options in GUIDERS.items()
    ),
]


# options


def encoded(pipe: Any, texts: list[str]) -> dict[str, Any]:
    positive, negative = pipe.encode_prompt(texts, "cpu", 1, True, [""] * len(texts))[:2]
    return dict(prompt_embeds=positive, negative_prompt_embeds=negative)


def in_chunks(pipe: Any, texts: list[str]) -> dict[str, Any]:
    """Twice the tokenizer's length, as prompt-weighting libraries encode long prompts."""
    embeds = encoded(pipe, texts)
    tail = encoded(pipe, ["at sunset"] * len(texts))
    return {key: torch.cat([embeds[key], tail[key]], 1) for key in embeds}


def end_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    pipe._guidance_scale = 1.0
    return {"prompt_embeds": tensors["prompt_embeds"][-2:]}


def scale_in_place(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors["prompt_embeds"].mul_(1.01)
    return {}


def follow_steps(pipe: Any, handle: Handle | None) -> None:
    if handle is not None:
        handle.set("teddy", strength=[0.5, 1.0])


def callback(function: Callable) -> dict[str, Any]:
    return dict(callback_on_step_end=function, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def lora(pipe: Any, handle: Any = None) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        model = denoiser(pipe)
        if hasattr(model, "add_adapter"):
            model.add_adapter(config, "style")
        else:  # transformers that diffusers loads no LoRA into
            inject_adapter_in_model(config, model, "style")


def fused_lora(pipe: Any, handle: Any = None) -> None:
    lora(pipe)
    pipe.fuse_lora()


def unloaded_lora(pipe: Any, handle: Any = None) -> None:
    lora(pipe)
    pipe.unload_lora_weights()


def textual_inversion(pipe: Any, handle: Any = None) -> None:
    pipe.load_textual_inversion(torch.ones(2, 16), token="<style>")


def with_style(pipe: Any, texts: list[str]) -> dict[str, Any]:
    return {"prompt": [f"<style> {text}" for text in texts]}


def ip_adapter(pipe: Any, handle: Any = None) -> None:
    generator, width = torch.Generator().manual_seed(4), 16
    image = {"proj.weight": torch.randn(4 * width, 12, generator=generator), "proj.bias": torch.zeros(4 * width)}
    image |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    layers = {
        f"{2 * number + 1}.to_{kind}_ip.weight": torch.randn(layer.to_v.out_features, width, generator=generator)
        for number, layer in enumerate(cross_attention_layers(pipe.unet).values())
        for kind in "kv"
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": layers}])


IMAGE_EMBEDS = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(6))


def group_offload(kind: str, **options: Any) -> Callable[[Any, Any], None]:
    cpu = torch.device("cpu")
    return lambda pipe, handle: apply_group_offloading(denoiser(pipe), onload_device=cpu, offload_device=cpu, offload_type=kind, **options)


def sequential_offload(pipe: Any, handle: Any = None) -> None:
    """What enable_sequential_cpu_offload does to the denoiser; accelerate refuses to do it to a text encoder's buffers on a CPU."""
    cpu_offload(denoiser(pipe), torch.device("cpu"))


def float8(pipe: Any, handle: Any = None) -> None:
    denoiser(pipe).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def saved(pipe: Any, handle: Any) -> None:
    """What was saved is a pipeline without a trace of perfusion, and loads into the one that goes on."""
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        again = type(pipe).from_pretrained(folder)
    theirs = again.unet.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in pipe.unet.state_dict().items()) and len(theirs) == len(
        pipe.unet.state_dict()
    )
    again.set_progress_bar_config(disable=True)
    assert not leftovers(again)


def shared(pipe: Any, handle: Any) -> None:
    """Another pipeline on the same UNet, with a concept of its own under the same name."""
    other = type(pipe).from_pipe(pipe)
    if handle is not None:
        attach(other).load(make_concept(handle.base, "teddy", seed=7))
        Case("").draw(other, PROMPTS)
        detach(other)


def again(pipe: Any, handle: Any) -> None:
    """A run with a concept, then detach and attach: covered by the case's own detach, so this does it once more before."""
    if handle is not None:
        exact, concept = handle.exact, concept_of(pipe)
        Case("").draw(pipe, PROMPTS)
        detach(pipe)
        attach(pipe, exact=exact).load(concept)


def interrupted(pipe: Any, handle: Any) -> None:
    """A run that an exception ends in the midst of the UNet."""

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    hook = pipe.unet.up_blocks[0].register_forward_pre_hook(stop)
    with contextlib.suppress(KeyboardInterrupt):
        Case("").draw(pipe, PLAIN if handle is None else PROMPTS)
    hook.remove()


def cast(dtype: torch.dtype) -> Callable[[Any, Any], None]:
    def change(pipe: Any, handle: Any) -> None:
        if handle is not None:
            Case("").draw(pipe, PROMPTS)
        pipe.to(dtype)

    return change


def call(name: str, *arguments: Any, **options: Any) -> Callable[[Any, Any], None]:
    """A method of the pipeline as a change."""
    return lambda pipe, handle: getattr(pipe, name)(*arguments, **options) and None


XL = functools.partial(Case, build=tiny_sdxl)
SIGMA = functools.partial(Case, build=tiny_pixart, options=PIXART)
KOLORS = functools.partial(Case, build=tiny_kolors, options=GLM, needs="sentencepiece")
OPTIONS = [
    Case("negative prompts", options=dict(negative_prompt=["bad", "dark"])),
    Case("guidance off", options=dict(guidance_scale=1.0)),
    Case("several images per prompt", options=dict(num_images_per_prompt=2)),
    Case("`prompt_embeds` given", prompts=encoded, neutral=True),
    Case("long prompts in chunks", prompts=in_chunks),
    Case("callback that ends guidance", options=callback(end_guidance)),
    Case("callback that changes encodings in place", options=callback(scale_in_place) | dict(num_inference_steps=5)),
    Case("strength that follows the steps", change=follow_steps),
    Case("`torch.inference_mode`", around=torch.inference_mode, neutral=True),
    Case("autocast to bfloat16", around=lambda: torch.autocast("cpu", torch.bfloat16), tolerance=0.08),
    Case("bfloat16", functools.partial(tiny_sd, dtype=torch.bfloat16), tolerance=0.08),
    Case("float16", functools.partial(tiny_sd, dtype=torch.float16), tolerance=0.01),
    Case("`.to(torch.bfloat16)` after attach", change=cast(torch.bfloat16), tolerance=0.08),
    Case('`.to("cpu")` after attach', change=call("to", "cpu"), neutral=True),
    Case("channels last", change=lambda pipe, handle: pipe.unet.to(memory_format=torch.channels_last) and None, neutral=True),
    Case("attention slicing before attach", change=call("enable_attention_slicing", 1), before=True, neutral=True),
    Case("attention slicing after attach", change=call("enable_attention_slicing", 1), neutral=True),
    Case(
        "VAE slicing and tiling", change=lambda pipe, handle: (pipe.vae.enable_slicing(), pipe.vae.enable_tiling()) and None, neutral=True
    ),
    Case("FreeU", change=call("enable_freeu", s1=0.9, s2=0.2, b1=1.4, b2=1.6)),
    Case("LoRA before attach", change=lora, before=True),
    Case("LoRA after attach", change=lora),
    Case("LoRA scaled by the call (`cross_attention_kwargs`)", change=lora, options=dict(cross_attention_kwargs={"scale": 0.3})),
    Case("LoRA fused", change=fused_lora),
    Case("LoRA unloaded", change=unloaded_lora, neutral=True),
    Case("textual inversion", change=textual_inversion, before=True, prompts=with_style),
    Case("IP-Adapter before attach", change=ip_adapter, before=True, options=dict(ip_adapter_image_embeds=[IMAGE_EMBEDS])),
    Case("IP-Adapter after attach", change=ip_adapter, options=dict(ip_adapter_image_embeds=[IMAGE_EMBEDS])),
    Case("model offload", change=call("enable_model_cpu_offload", device="cpu"), neutral=True),
    Case("sequential offload", change=sequential_offload, neutral=True),
    Case("group offload, by leaf", change=group_offload("leaf_level"), neutral=True),
    Case("group offload, by block", change=group_offload("block_level", num_blocks_per_group=1), neutral=True),
    Case("float8 layer-wise casting", change=float8),
    Case("`save_pretrained`", change=saved, neutral=True),
    Case("two pipelines on one UNet (`from_pipe`)", change=shared, neutral=True),
    Case("attach, detach, attach", change=again, neutral=True),
    Case("an exception in mid-generation", change=interrupted, neutral=True),
    XL("SDXL, `torch.inference_mode`", around=torch.inference_mode, neutral=True),
    XL("SDXL, LoRA after attach", change=lora),
    XL("SDXL, sequential offload", change=sequential_offload, neutral=True),
    SIGMA("PixArt-Σ, several images per prompt", options=PIXART | dict(num_images_per_prompt=2)),
    SIGMA("PixArt-Σ, strength that follows the steps", change=follow_steps),
    SIGMA("PixArt-Σ, bfloat16", build=functools.partial(tiny_pixart, dtype=torch.bfloat16), tolerance=0.08),
    SIGMA("PixArt-Σ, LoRA after attach", change=lora),
    SIGMA("PixArt-Σ, sequential offload", change=sequential_offload, neutral=True),
    SIGMA("PixArt-Σ, group offload, by block", change=group_offload("block_level", num_blocks_per_group=1), neutral=True),
    SIGMA("PixArt-Σ, float8 layer-wise casting", change=float8),
    KOLORS("Kolors, negative prompts", options=GLM | dict(negative_prompt=["bad", "dark"])),
    KOLORS("Kolors, strength that follows the steps", change=follow_steps),
    KOLORS("Kolors, LoRA after attach", change=lora),
]

# what is refused


def around(name: str, **parts: Callable[[], torch.nn.Module]) -> Callable[[], Any]:
    """A pipeline of diffusers that has these parts alone."""

    def make() -> Any:
        kind = getattr(diffusers, name)
        parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
        return kind(**{each.name: None for each in parameters if each.default is each.empty} | {key: part() for key, part in parts.items()})

    return make


def fused() -> Any:
    pipe = tiny_sd()
    pipe.fuse_qkv_projections(vae=False)
    return pipe


def added_kv() -> torch.nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"), attention_head_dim=4,
    )  # fmt: skip


def sd3() -> torch.nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip


def flux() -> torch.nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Refusal:
    """name: its row of the page. build: the pipeline. reason, instead: what the error must say, and what the page says."""

    name: str
    build: Callable[[], Any]
    reason: str
    instead: str


EXAMPLES = "diffusers' examples/dreambooth/train_dreambooth_lora"
FAMILIES = "Stable Diffusion 1.x, 2.x and XL, Kolors, PixArt-α and Σ"
TO_LORA = "a LoRA of that model by peft"
REFUSED = [
    Refusal(
        "StableDiffusion3Pipeline",
        around("StableDiffusion3Pipeline", transformer=sd3),
        "mixes text and image states in joint attention",
        f"{EXAMPLES}_sd3.py",
    ),
    Refusal(
        "FluxPipeline", around("FluxPipeline", transformer=flux), "mixes text and image states in joint attention", f"{EXAMPLES}_flux.py"
    ),
    Refusal("IFPipeline", around("IFPipeline", unet=added_kv), "added key and value projections", FAMILIES),
    Refusal(
        "KandinskyV22Pipeline",
        around("KandinskyV22Pipeline", unet=added_kv, movq=lambda: tiny_sd().vae),
        "added key and value projections",
        FAMILIES,
    ),
    Refusal("fused projections", fused, "fused key and value projections", "unfuse_qkv_projections()"),
]

CASES = {case.name: case for case in (*PIPELINES, *OPTIONS)}
PATHS = {"slots": "fast: slots", "fused": "fast: fused", "schedule": "fast: schedule", "hooks": "hooks", "stock": "stock"}


def rows() -> dict[str, str]:
    """The lines of the tables that are written here, which end with a mark, by what stands first."""
    written = "".join(part.rpartition("\n<!-- ")[2] for part in PAGE.read_text(encoding="utf-8").split("<!-- end -->")[:-1])
    lines = [line for line in written.splitlines() if line.startswith("| ")]
    return {line.strip("| ").split(" | ")[0]: line for line in lines if line.split(" | ")[0] not in ("| Pipeline", "| Option", "| Refused")}


def row_of(case: Case | Refusal, path: str = "") -> str:
    """A line of the page: what was drawn, and by which path, or what was refused, why, and what to use instead."""
    if isinstance(case, Refusal):
        return f"| {case.name} | {case.reason} | {case.instead} |"
    return f"| {case.name} | {', then '.join(PATHS[form] for form in path.split(' + '))} |"


def write() -> None:
    """The page's tables anew."""
    text = PAGE.read_text(encoding="utf-8")
    for head, cases in (("Pipeline | Path", PIPELINES), ("Option | Path", OPTIONS), ("Refused | Why | Use instead", REFUSED)):
        lines = [f"| {head} |", "|---" * (1 + head.count("|")) + "|"]
        for case in cases:
            lines.append(row_of(case) if isinstance(case, Refusal) else row_of(case, run(case).path))
            print(lines[-1], file=sys.stderr, flush=True)
        mark = f"<!-- {head.partition(' ')[0]} -->\n"
        before, _, rest = text.partition(mark)
        text = before + mark + "\n".join(lines) + "\n<!-- end -->" + rest.partition("<!-- end -->")[2]
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
