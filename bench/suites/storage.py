"""Bytes of one learned subject, as the real libraries write it to disk, at the shapes of SD 1.5 and SDXL.

The UNets are on the meta device and have no values; what is learned is there in full, filled with zeros, in float16, and written by
the library's own code. A full fine-tuning is counted instead, two bytes a parameter.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import rows
from bench.measure import Options

UNETS = {
    "sd15": dict(
        block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ),
    "sdxl": dict(
        block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    ),
}  # fmt: skip
TEXT_WIDTHS = {"sd15": (768,), "sdxl": (768, 1280)}
RANKS = (4, 16)
FINGERPRINT = base64.b64encode(bytes(32)).decode()


def unet(model: str) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**UNETS[model])


def perfusion(model: str, folder: Path) -> str:
    from perfusion.base import Base, cross_attention_layers, layer_width
    from perfusion.concept import Concept

    layers = {name: layer_width(layer) for name, layer in cross_attention_layers(unet(model)).items()}
    widths, family = TEXT_WIDTHS[model], {"sd15": "sd1", "sdxl": "sdxl"}[model]
    encoders = ".".join([FINGERPRINT] * len(widths))
    base = Base(family=family, encoding_dim=sum(widths), text_widths=widths, layers=layers, text_encoder=encoders)
    target = torch.ones(base.encoding_dim)
    Concept(
        name="subject", superclass="cat", base=base, value_outputs=torch.zeros(base.outputs), target=target, metric_target=target,
        superclass_encoding=target, word_embeddings=tuple(map(torch.zeros, widths)), covariance="0123456789abcdef",
    ).save(folder / "subject.safetensors")  # fmt: skip
    return "values of every layer, a target and word embeddings"


def textual_inversion(model: str, folder: Path) -> str:
    from safetensors.torch import save_file

    names = ("<subject>",) if model == "sd15" else ("clip_l", "clip_g")
    save_file({name: torch.zeros(1, width).half() for name, width in zip(names, TEXT_WIDTHS[model])}, folder / "learned_embeds.safetensors")
    return "one word embedding for each text encoder"


def lora(model: str, folder: Path, rank: int) -> str:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    net = unet(model)
    net.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(net))
    layers = {name: torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in layers.items()}
    pipeline = StableDiffusionPipeline if model == "sd15" else StableDiffusionXLPipeline
    pipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return f"rank {rank} in to_q, to_k, to_v and to_out of all attention"


def custom_diffusion(model: str, folder: Path) -> str:
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    net, processors = unet(model), {}
    for name, layer in ((f"{name}.processor", layer) for name, layer in net.named_modules() if hasattr(layer, "to_k")):
        cross = layer.to_k.in_features if layer.is_cross_attention else None
        processors[name] = CustomDiffusionAttnProcessor(
            train_kv=cross is not None, train_q_out=False, hidden_size=layer.to_q.in_features, cross_attention_dim=cross
        ).half()
    net.set_attn_processor(processors)
    net.save_attn_procs(folder)
    return "to_k and to_v of cross-attention"


def dreambooth(model: str, folder: Path) -> int:
    return 2 * sum(parameter.numel() for parameter in unet(model).parameters())


PROVIDERS: dict[str, Callable[[str, Path], str]] = {
    "perfusion": perfusion,
    "textual inversion": textual_inversion,
    **{f"LoRA, rank {rank}": lambda model, folder, rank=rank: lora(model, folder, rank) for rank in RANKS},
    "Custom Diffusion": custom_diffusion,
    "DreamBooth": dreambooth,
}


def measured(options: Options) -> Iterator[dict[str, Any]]:
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it lists the processors that have nothing to save
    models = ("sd15",) if options.quick else tuple(filter(UNETS.get, options.models))
    for model in models:
        for provider, write in PROVIDERS.items():
            row = {
                "suite": "storage", "case": model, "provider": provider, "dtype": "float16", "shapes": {}, **rows.provenance("cpu"),
                "quick": options.quick,
            }  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                try:
                    said = write(model, Path(folder))
                except Exception as error:  # a library that is not here, or of another version
                    yield {**row, "gate": "not passed", "reason": f"{type(error).__name__}: {error}"}
                    continue
                files = [path for path in Path(folder).rglob("*") if path.is_file()]
                if isinstance(said, int):
                    yield {**row, "gate": "counted", "file_bytes": said, "holds": "the whole UNet"}
                else:
                    yield {**row, "gate": "written", "file_bytes": sum(path.stat().st_size for path in files), "holds": said}
