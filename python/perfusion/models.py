"""`load_pipeline`: toybox by default, or any checkpoint in diffusers' folder format."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch

__all__ = ["TOYBOX", "ModelError", "load_pipeline"]

TOYBOX = Path(__file__).parent / "toybox" / "weights"


class ModelError(ValueError):
    """A model that cannot be loaded. The message says what was looked for and what to give instead."""


def load_pipeline(model: str | Path = "toybox", *, device: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """A text-to-image pipeline, ready to run, with its progress bar off.

    model: "toybox", or a folder with a `model_index.json`. Nothing is downloaded. device: by default CUDA where there is
    one. dtype: by default float32 on a CPU and float16 elsewhere. ModelError says what is wrong with the folder.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging

    import perfusion.toybox.vae  # noqa: F401  diffusers takes a pipeline's own classes from imported modules only

    folder = TOYBOX if str(model) == "toybox" else Path(model).expanduser()
    if not (folder / "model_index.json").is_file():
        missing = "has no model_index.json" if folder.is_dir() else "is not a folder"
        raise ModelError(
            f"model {str(model)!r} {missing}: give 'toybox' or the path of a checkpoint in diffusers' folder format "
            "(a single .safetensors checkpoint becomes one with StableDiffusionPipeline.from_single_file(...).save_pretrained(folder))."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.float16)
    diffusers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if torch.device(device).type == "cpu" and dtype == torch.float16:
        warnings.warn("float16 on a CPU is slow and rounds coarsely; float32, the default there, is better.", stacklevel=2)
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # remarks that nobody here can act on: on the folder, and one a model on float16
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # `dtype` is `torch_dtype` in the oldest diffusers that is supported
            pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {str(model)!r} could not be loaded: {error}") from error
    finally:
        diffusers_logging.set_verbosity(verbosity)
