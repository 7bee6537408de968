"""Personalised text-to-image by key-locked rank-one editing (Perfusion, arXiv 2305.01644), for diffusers pipelines.

    pipe = perfusion.load_pipeline("toybox")        # or the folder of any checkpoint; a pipeline of your own does as well
    with perfusion.attach(pipe) as handle:
        handle.load("teddy.safetensors")
        image = pipe("a <teddy> on the beach").images[0]

    Concept                     one learned word, and its file
    train                       learns one from a few pictures
    attach, detach              teach one pipeline object to read <name> in prompts, and undo it
    Request                     a prompt with what its row wants beside the text: settings, schedules, regions
    ConceptStore                any number of concepts by id, of which a device holds the few in use
    export                      a model as a folder that runs without torch; perfusion.runtime draws with it
    load_pipeline               the built-in model, or a checkpoint in diffusers' folder format
    Covariance, get_covariance  the metric in which text encodings are compared

Names are imported when they are first used: importing this package imports neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perfusion.concept import Concept
    from perfusion.concept_store import ConceptStore
    from perfusion.covariance import Covariance, get_covariance
    from perfusion.exporting import export
    from perfusion.handle import attach, detach
    from perfusion.models import load_pipeline
    from perfusion.requests import Request
    from perfusion.training import train

__version__ = "0.1.0"

__all__ = [
    "Concept",
    "ConceptStore",
    "Covariance",
    "Request",
    "__version__",
    "attach",
    "detach",
    "export",
    "get_covariance",
    "load_pipeline",
    "train",
]

_MODULES = {
    "Concept": "concept",
    "ConceptStore": "concept_store",
    "Covariance": "covariance",
    "Request": "requests",
    "attach": "handle",
    "detach": "handle",
    "export": "exporting",
    "get_covariance": "covariance",
    "load_pipeline": "models",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'perfusion' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"perfusion.{_MODULES[name]}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
