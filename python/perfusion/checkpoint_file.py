"""A checkpoint that is one .safetensors file, as model sites give them: what it is, by its header alone, and loading it.

    kind = read_kind("dreamshaper_8.safetensors")      # Stable Diffusion 1.5; reads no weights
    pipe = load_file("dreamshaper_8.safetensors", kind, torch.float16)

What the weights do not say (configurations, the vocabulary) ships with this package: nothing is downloaded. Such files keep the
layer names of the original implementations; diffusers renames them (`from_single_file`).
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from perfusion.clip_vocabulary import write_tokenizer
from perfusion.families import CUSTOM, FAMILIES, family_by_id
from perfusion.files import user_path

__all__ = ["CheckpointError", "Kind", "configuration", "load_file", "read_kind", "write_configuration"]

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_CONV_IN = _UNET + "input_blocks.0.0.weight"
PREDICTIONS = ("epsilon", "v_prediction")


class CheckpointError(ValueError):
    """A file that is no checkpoint of a supported family. The message says what it is instead, where that can be told."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a checkpoint file is: the id of its family; 9 input channels for inpainting, otherwise 4; what it predicts."""

    family: str
    channels: int
    prediction_type: str
    has_vae: bool

    @property
    def inpainting(self) -> bool:
        return self.channels == 9

    @property
    def pipeline(self) -> str:
        """The name of diffusers' pipeline class."""
        return family_by_id(self.family).checkpoint.pipelines[self.channels]

    def __str__(self) -> str:
        return configuration(self.family)["name"] + (" inpainting" if self.inpainting else "")


def configuration(family: str) -> dict[str, Any]:
    """The family's configuration, by component; a copy."""
    return json.loads((resources.files("perfusion") / "configurations" / f"{family}.json").read_text(encoding="utf-8"))


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """name -> shape of every tensor, and the metadata. CheckpointError for a file that is damaged or of another format."""
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise CheckpointError(
            f"{str(path)!r} is a pickle, which can hold code and is not read. Take the .safetensors file of the same model, or convert it."
        )
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as a .safetensors file: {error}. Is the download complete?") from error


def read_kind(path: Path, prediction_type: str | None = None) -> Kind:
    """What a file holds, by its header. CheckpointError says what it is where it is no checkpoint that can be used.

    prediction_type: what to assume where the file says nothing, which is usual: by default velocity for SD 2.x, noise otherwise.
    """
    if prediction_type not in (None, *PREDICTIONS):
        raise CheckpointError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {prediction_type!r}")
    return kind_of(path, *read_header(path), prediction_type)


def kind_of(path: str | Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str], prediction_type: str | None = None) -> Kind:
    """`read_kind` of a header that was read elsewhere; path is what errors call the file."""
    if _CONV_IN not in shapes:
        raise CheckpointError(f"{str(path)!r} is {_other(shapes, metadata)}.")
    for family in FAMILIES.values():
        file = family.checkpoint
        read = None if file is None else shapes.get(f"{_UNET}{file.layer}.transformer_blocks.0.attn2.to_k.weight")
        if read is not None and read[1] == family.encoding_dim:
            break
    else:
        refiner = "conditioner.embedders.0.model.positional_embedding" in shapes
        what = "the refiner of Stable Diffusion XL, which has no concepts of its own" if refiner else "of a family that is not known"
        raise CheckpointError(f"{str(path)!r} is {what}. Supported are Stable Diffusion 1.x, 2.x and XL, inpainting included.")
    texts = file.text_weights
    missing = [name for name in texts if name not in shapes]
    if missing:
        raise CheckpointError(
            f"{str(path)!r} holds a UNet of {configuration(family.id)['name']} without its text encoder{'s' if len(texts) > 1 else ''} "
            f"(no {missing[0]}). A concept lives in the text encoder's output: take the full checkpoint."
        )
    channels = shapes[_CONV_IN][1]
    if channels not in file.pipelines:
        raise CheckpointError(f"{str(path)!r} has a UNet of {channels} input channels; 4 are supported, and 9 for inpainting.")
    said = metadata.get("modelspec.prediction_type", "")
    told = "v_prediction" if "v_pred" in shapes or said.startswith("v") else "epsilon" if said.startswith("eps") else None
    usual = file.prediction.get(channels, "epsilon")
    return Kind(family.id, channels, prediction_type or told or usual, any(name.startswith(_VAE) for name in shapes))


def _other(shapes: dict[str, Any], metadata: dict[str, str]) -> str:
    """What a file without a UNet of the original layout is, and what to do with it."""
    names = list(shapes)

    def some(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    if any(key.startswith("perfusion.") for key in metadata):
        return "a Perfusion concept, not a model: give it with --concept (handle.load) beside a model"
    if some("lora_down", "lora_up", ".lora_A", ".lora_B", "lora_unet_", ".lora."):
        return "a LoRA, not a model: give it with --lora beside a model"
    if some("emb_params", "string_to_param") or (len(names) <= 2 and set(CUSTOM.embeddings) & set(names)):
        return "a textual inversion, not a model: give it with --embedding beside a model"
    if some("control_model.", "controlnet_"):
        return "a ControlNet, not a model"
    if some("double_blocks.", "joint_blocks."):
        return "a transformer that mixes text and image states in joint attention (as SD3 and Flux do), which cannot be edited"
    if some("decoder.conv_in", "decoder.mid"):
        return "a VAE, not a model: give it with --vae beside a model"
    if some("down_blocks.0."):
        return "one part of a model in diffusers' format: give the folder with the model_index.json"
    return "not a checkpoint of Stable Diffusion 1.x, 2.x or XL: it has no " + _CONV_IN


def write_configuration(folder: Path, kind: Kind) -> None:
    """A folder in diffusers' format without any weights, for `kind`."""
    config = configuration(kind.family)
    config["unet"]["in_channels"] = kind.channels
    config["scheduler"]["prediction_type"] = kind.prediction_type
    if kind.prediction_type == "v_prediction" and family_by_id(kind.family).checkpoint.zero_snr:
        config["scheduler"]["rescale_betas_zero_snr"] = True
    config["model_index"]["_class_name"] = kind.pipeline
    file_names = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
    for name, values in config.items():
        if name.startswith("tokenizer"):
            write_tokenizer(folder / name, values)
        elif isinstance(values, dict):
            path = folder / file_names.get(name, f"{name}/config.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values), encoding="utf-8")


def load_file(path: Path, kind: Kind, dtype: torch.dtype, *, vae: str | Path | None = None) -> Any:
    """The pipeline of a checkpoint file, on the CPU. vae: a file or folder to use instead of the one that is baked in.

    CheckpointError where there is no VAE, or weights are missing.
    """
    import diffusers

    if not kind.has_vae and vae is None:
        raise CheckpointError(f"{str(path)!r} has no VAE baked in. Give one with --vae (vae=): the {kind} one fits.")
    with tempfile.TemporaryDirectory(prefix="perfusion-") as folder:
        write_configuration(Path(folder), kind)
        parameters = inspect.signature(getattr(diffusers, kind.pipeline).__init__).parameters
        given = {"safety_checker": None} if "safety_checker" in parameters else {}
        if vae is not None:
            given["vae"] = load_vae(Path(vae), Path(folder), dtype)
        pipe = getattr(diffusers, kind.pipeline).from_single_file(
            str(path), config=folder, torch_dtype=dtype, local_files_only=True, **given
        )
    empty = [name for part in (pipe.unet, pipe.vae) for name, weight in part.named_parameters() if weight.is_meta]
    if empty:
        raise CheckpointError(f"{str(path)!r} is incomplete: it has no weights for {empty[0]} and {len(empty) - 1} more.")
    pipe.register_to_config(_name_or_path=str(path))
    return pipe


def load_vae(path: Path, folder: Path, dtype: torch.dtype) -> Any:
    """A VAE from a .safetensors file of either layout, or a folder in diffusers' format. folder: where its configuration is."""
    from diffusers import AutoencoderKL

    path = user_path(path)
    if path.is_dir():
        inner = path / "vae" if (path / "vae" / "config.json").is_file() else path
        return AutoencoderKL.from_pretrained(inner, torch_dtype=dtype, local_files_only=True)
    shapes, _ = read_header(path)
    if not any("decoder.conv_in.weight" in name for name in shapes):
        raise CheckpointError(f"vae: {str(path)!r} holds no VAE.")
    return AutoencoderKL.from_single_file(str(path), config=str(folder), subfolder="vae", torch_dtype=dtype, local_files_only=True)
