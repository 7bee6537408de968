"""`load_pipeline`: toybox by default, or a checkpoint as people have it: a folder, one file, or an id on the hub."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from perfusion import hub
from perfusion.base import text_encoders
from perfusion.base.dense import quantised_layers
from perfusion.base.parts import DENOISERS
from perfusion.checkpoint_file import CheckpointError, load_file, load_vae, read_header, read_kind
from perfusion.families import CUSTOM
from perfusion.files import user_path

__all__ = ["TOYBOX", "ModelError", "add_embedding", "add_lora", "load_pipeline", "resolve"]

TOYBOX = Path(__file__).parent / "toybox" / "weights"
FORMS = (
    "'toybox', the folder of a checkpoint in diffusers' format, one .safetensors checkpoint of Stable Diffusion 1.x, 2.x or XL, "
    "or an id on the Hugging Face hub (user/model)"
)
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)")


class ModelError(ValueError):
    """A model that cannot be loaded. The message says what was looked for and what to give instead."""


def configurations(model: str | Path) -> tuple[Path | hub.Header, int | None]:
    """As `resolve`, for a look at the configurations: weights on the hub are not fetched, and their size in bytes comes instead.

    Of a checkpoint file on the hub comes its header.
    """
    if hub.hub_id(model) is None:
        return resolve(model), None
    try:
        return hub.configurations(str(model))
    except hub.HubError as error:
        raise ModelError(f"model: {error} Give {FORMS}.") from error


def resolve(model: str | Path, *, half: bool = False) -> Path:
    """The folder or file that `model` means. An id on the hub is fetched, unless the cache has it. ModelError says what is wrong."""
    if str(model) == "toybox":
        return TOYBOX
    named = hub.hub_id(model)
    if named is not None:
        try:
            return hub.model_path(str(model), half=half)
        except hub.HubError as error:
            raise ModelError(f"model: {error} Give {FORMS}.") from error
    try:
        path = user_path(model)
    except ValueError as error:
        raise ModelError(f"model: {error} Give {FORMS}.") from None
    if os.path.isfile(path) or os.path.isfile(path / "model_index.json"):
        return path
    if not os.path.isdir(path):
        raise ModelError(f"model {str(model)!r} is neither a folder nor a file: give {FORMS}.")
    if os.path.isfile(path / "manifest.json"):
        raise ModelError(f"model {str(model)!r} is an exported one: draw with it by `perfusion generate --runtime onnx`, or give {FORMS}.")
    inside = sorted(each.name for each in path.glob("*.safetensors"))
    hint = f" It holds {', '.join(inside[:5])}: give one of these files." if inside else ""
    raise ModelError(f"model {str(model)!r} has no model_index.json: give {FORMS}.{hint}")


def load_pipeline(
    model: str | Path = "toybox",
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    vae: str | Path | None = None,
    prediction_type: str | None = None,
    text_encoder_bits: int | None = None,
) -> Any:
    """A pipeline, ready to run, with its progress bar off.

    model: "toybox"; a folder with a `model_index.json` (weights as safetensors or .bin, sharded, or in an fp16 variant only);
    one .safetensors checkpoint of SD 1.x, 2.x or XL, inpainting included; or `user/model`, `user/model@revision` or
    `user/model/file.safetensors` on the Hugging Face hub. Nothing is downloaded unless a hub id is given. device: by default
    CUDA where there is one. dtype: by default float32 on a CPU and float16 elsewhere. vae: a file or folder to use instead of
    the model's own. prediction_type: "epsilon" or "v_prediction", where a checkpoint file does not say it: SD 2.x is taken
    for a velocity model. text_encoder_bits: 8 keeps the matrices of the text encoders in 8 bits, by optimum-quanto: a quarter of
    float32, and half of float16, which matters for T5. Concepts may be learned and drawn with it.
    ModelError says what is wrong with the model.
    """
    if text_encoder_bits not in (None, 8):
        raise ModelError(f"text_encoder_bits must be 8, or left out, got {text_encoder_bits!r}.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.float16)
    path = resolve(model, half=dtype != torch.float32)
    if torch.device(device).type == "cpu" and dtype == torch.float16:
        warnings.warn("float16 on a CPU is slow and rounds coarsely; float32, the default there, is better.", stacklevel=2)
    with _quiet():
        try:
            if path.is_file():
                pipe = load_file(path, read_kind(path, prediction_type), dtype, vae=vae)
            else:
                pipe = _load_folder(path, dtype, vae)
            if text_encoder_bits is not None:
                _in_8_bits(pipe)
            pipe.set_progress_bar_config(disable=True)
            return pipe.to(device)
        except ModelError:
            raise
        except CheckpointError as error:
            raise ModelError(f"model: {error}") from error
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ModelError(f"model {str(model)!r} could not be loaded: {error}") from error


def _load_folder(folder: Path, dtype: torch.dtype, vae: str | Path | None) -> Any:
    from diffusers import DiffusionPipeline

    import perfusion.toybox.vae  # noqa: F401  diffusers takes a pipeline's own classes from imported modules only

    given = {} if vae is None else {"vae": load_vae(Path(vae), folder, dtype)}
    return DiffusionPipeline.from_pretrained(
        folder, torch_dtype=dtype, variant=variant_of(folder), local_files_only=True, safety_checker=None, **given
    )


def _in_8_bits(pipe: Any) -> None:
    """Exchange the linear layers of the text encoders, where a checkpoint is not quantised already."""
    try:
        from optimum.quanto import freeze, qint8, quantize
    except ImportError:
        raise ModelError("text encoders in 8 bits need the package optimum-quanto: pip install optimum-quanto") from None
    for _, encoder in text_encoders(pipe):
        if not quantised_layers(encoder):
            quantize(encoder, weights=qint8)
            freeze(encoder)


def variant_of(folder: Path) -> str | None:
    """The variant, such as "fp16", of the denoiser's weights where no others are there."""
    paths = [path for name in DENOISERS for path in sorted((folder / name).glob("*"))]
    found = [match[1] for path in paths if (match := _WEIGHTS.fullmatch(path.name))]
    return None if None in found or not found else found[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without remarks that nobody here can act on: on the folder, and one a model on float16."""
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several LoRAs are meant
            warnings.simplefilter("ignore", FutureWarning)  # `dtype` is `torch_dtype` in the oldest diffusers that is supported
            yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


# What is loaded beside a model


def _beside(model: str | Path, name: str, folders: Sequence[str]) -> Path:
    """A file by its path, or by its bare name in the model's folder or a folder of such files beside it. ModelError where there is none."""
    try:
        path, home = user_path(name), user_path(model)
    except ValueError as error:
        raise ModelError(str(error)) from None
    if os.path.isfile(path):
        return path
    home = home.parent if os.path.isfile(home) else home
    places = [home, *(base / folder for base in (home, home.parent) for folder in folders)]
    for place in places if path.parent == Path() else ():
        for file in (place / name, place / f"{name}.safetensors"):
            if os.path.isfile(file):
                return file
    raise ModelError(f"there is no file {name!r}, here or beside the model. Check the path.")


def add_embedding(pipe: Any, file: str, *, token: str | None = None, model: str | Path = "toybox") -> str:
    """Load a textual inversion; returns the word that prompts write. file: its path, or its bare name beside the model."""
    from safetensors.torch import load_file as load_tensors

    path = _beside(model, file, ("embeddings", "Embeddings", "embedding"))
    token = token or path.stem
    encoders = text_encoders(pipe, required=False)
    with _quiet():
        try:
            if len(encoders) == 1:
                pipe.load_textual_inversion(str(path), token=token, local_files_only=True)
                return token
            tensors = load_tensors(path)
            keys = CUSTOM.embeddings
            if not set(keys) <= set(tensors):
                raise ModelError(f"embedding {str(path)!r} is not one for two text encoders: it has no {' and '.join(keys)}.")
            for key, (tokenizer, encoder) in zip(keys, encoders):
                pipe.load_textual_inversion(tensors[key], token=token, text_encoder=encoder, tokenizer=tokenizer)
        except ModelError:
            raise
        except Exception as error:  # diffusers raises what it meets
            raise ModelError(f"embedding {str(path)!r} could not be loaded: {error}") from error
    return token


def add_lora(pipe: Any, file: str, *, scale: float = 1.0, model: str | Path = "toybox") -> str:
    """Load a LoRA in kohya's or diffusers' names; returns its adapter's name. file: its path, or its bare name beside the model."""
    path = _beside(model, file, ("loras", "lora", "Lora"))
    known = getattr(pipe, "_perfusion_lora_scales", {})
    name = stem = re.sub(r"\W", "_", path.stem)
    while name in known:  # of another folder, or "a b" beside "a.b"
        name = f"{stem}_{len(known) + 1}" if name == stem else f"{name}_"
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ModelError("a LoRA needs the package peft: pip install peft") from None
    with _quiet():
        try:
            read_header(path)
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name, local_files_only=True)
            adapters = pipe.get_active_adapters()
            if name not in adapters:
                raise ValueError("no layer of it fits this model")
            known[name] = scale
            pipe._perfusion_lora_scales = known
            pipe.set_adapters(list(known), list(known.values()))
        except Exception as error:
            raise ModelError(f"lora {str(path)!r} could not be loaded: {error}") from error
    return name
