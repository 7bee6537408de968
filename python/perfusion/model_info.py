"""What a model is, from its configurations and headers: no weights are read. `perfusion info` prints it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from perfusion import memory
from perfusion.base.parts import DENOISERS
from perfusion.checkpoint_file import CheckpointError, configuration, kind_of, read_kind
from perfusion.families import CUSTOM, family_by_widths
from perfusion.hub import Header
from perfusion.memory import Parts
from perfusion.models import ModelError, configurations

__all__ = ["describe", "parts_of"]

BATCH = 16
KINDS = ("UNet2DConditionModel", "PixArtTransformer2DModel")


def _configurations(path: Path | Header) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """The configuration of each part, the bytes on disk, and what a file's header says."""
    header = isinstance(path, Header)
    if header or path.is_file():
        try:
            kind = kind_of(path.name, path.shapes, path.metadata) if header else read_kind(path)
        except CheckpointError as error:
            raise ModelError(f"model: {error}") from error
        config = configuration(kind.family)
        config["unet"]["in_channels"] = kind.channels
        return config, path.size if header else path.stat().st_size, {"prediction_type": kind.prediction_type}
    config = {}
    for part in (*DENOISERS, "vae", *CUSTOM.text_encoders):
        file = path / part / "config.json"
        if file.is_file():
            config["unet" if part in DENOISERS else part] = json.loads(file.read_text(encoding="utf-8"))
    kind = config.get("unet", {}).get("_class_name", "UNet2DConditionModel")
    if "unet" not in config or "text_encoder" not in config or kind not in KINDS:
        raise ModelError(f"model {str(path)!r} has none of {', '.join(KINDS)} with a text encoder: it is of a kind that cannot be edited.")
    scheduler = path / "scheduler" / "scheduler_config.json"
    found = json.loads(scheduler.read_text(encoding="utf-8")) if scheduler.is_file() else {}
    size = sum(file.stat().st_size for file in path.rglob("*") if file.suffix in (".safetensors", ".bin"))
    return config, size, {"prediction_type": found.get("prediction_type", "epsilon")}


def _kind(config: dict[str, Any]) -> str:
    """diffusers' class of the denoiser."""
    return config["unet"].get("_class_name", KINDS[0])


def _width(config: dict[str, Any]) -> int:
    """The width of a text encoder: T5 calls it otherwise."""
    return config["d_model"] if "d_model" in config else config["hidden_size"]


def _text_encoder(config: dict[str, Any]) -> Any:
    """A text encoder of this configuration, with weights of whatever the current device has in it."""
    import transformers

    name = (config.get("architectures") or ["CLIPTextModel"])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ModelError(f"model: its text encoder is a {name}, which transformers does not know; its size cannot be told.")
    return cls(cls.config_class(**{key: value for key, value in config.items() if key not in ("architectures", "model_type")}))


def _count(name: str, config: dict[str, Any]) -> int:
    """Parameters of a part, from its configuration, without memory for them."""
    import diffusers

    from perfusion.toybox.vae import PatchAutoencoder

    with torch.device("meta"):
        if name in ("unet", "vae"):
            own = {PatchAutoencoder.__name__: PatchAutoencoder}
            cls = own.get(config["_class_name"]) or getattr(diffusers, config["_class_name"], None)
            if cls is None:
                raise ModelError(f"model: its {name} is a {config['_class_name']}, which diffusers {diffusers.__version__} does not know.")
            model = cls.from_config(config)
        else:
            model = _text_encoder(config)
        return sum(parameter.numel() for parameter in model.parameters())


def parts_of(config: dict[str, Any]) -> tuple[Parts, int]:
    """Sizes of a model by its configurations, and how many cross-attention layers it has."""
    import diffusers

    from perfusion.base import cross_attention_layers, layer_width

    with torch.device("meta"):
        layers = cross_attention_layers(getattr(diffusers, _kind(config)).from_config(config["unet"]))
    texts = sum(_count(name, config[name]) for name in CUSTOM.text_encoders if name in config)
    scale = 2 ** (len(config["vae"].get("block_out_channels", [1, 1, 1, 1])) - 1) if "vae" in config else 8
    side = config["unet"].get("sample_size") or 64
    parts = Parts(
        unet=_count("unet", config["unet"]), text_encoders=texts, vae=_count("vae", config["vae"]) if "vae" in config else 0,
        encoding_dim=config["unet"]["cross_attention_dim"], outputs=sum(layer_width(layer) for layer in layers.values()),
        size=(side if isinstance(side, int) else max(side)) * scale, vae_scale=scale,
        tokens=config["text_encoder"].get("max_position_embeddings", memory.TOKENS),
    )  # fmt: skip
    return parts, len(layers)


def describe(model: str) -> dict[str, Any]:
    """Facts of a model as JSON values. ModelError where it is none that can be edited."""
    path, whole = configurations(model)
    config, size, said = _configurations(path)
    size = size if whole is None else whole
    parts, layers = parts_of(config)
    widths = tuple(_width(config[name]) for name in CUSTOM.text_encoders if name in config)
    family = family_by_widths(widths, parts.encoding_dim)
    inpainting = config["unet"].get("in_channels") == 9
    rows, found, chosen = BATCH, {}, {}
    texts = [functools.partial(_text_encoder, config[name]) for name in CUSTOM.text_encoders if name in config]
    for dtype in (torch.float32, torch.bfloat16):
        saved = memory.saved_by_backward(config["unet"], parts.size // parts.vae_scale, dtype, texts, parts.tokens, _kind(config))
        low = memory.training(parts, saved, dtype, rows=1, batch=rows, checkpointing=True, low_memory=True)
        usual = memory.training(parts, saved, dtype, rows=rows, checkpointing=False, low_memory=False)
        chosen = low
        found[str(dtype).removeprefix("torch.")] = {
            "drawing": memory.total(memory.drawing(parts, dtype)) / 1e9,
            "training": memory.total(usual) / 1e9,
            "low_memory": memory.total(low) / 1e9,
        }
    return {
        "model": str(model), "family": family.id, "title": family.title, "inpainting": inpainting, **said,
        "parameters": {"unet": parts.unet, "text_encoders": parts.text_encoders, "vae": parts.vae},
        "bytes": size, "layers": layers, "outputs": parts.outputs, "encoding_dim": parts.encoding_dim, "size": parts.size,
        "memory": found, "training_parts": memory.table(chosen),
        "works": {
            "perfusion train" + (" (concepts are learned on the text-to-image model of the family)" if inpainting else ""): not inpainting,
            "perfusion generate" + (" --init-image --mask-image" if inpainting else ""): True,
            "perfusion convert --to lora, embedding, a1111, comfyui": widths and sum(widths) == parts.encoding_dim,
        },
    }  # fmt: skip
