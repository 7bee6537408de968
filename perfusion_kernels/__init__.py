"""Operators for key-locked rank-one editing of text-to-image models (Perfusion, arXiv 2305.01644).

    concept_gates           gates and components of every token, once per prompt
    edited_projection       edited keys or values of all layers at once
    fused_edited_projection the same in one launch, without bit equality to the unedited layer
    edited_attention        cross-attention, plain or with the edit applied to K and V on the fly
    fused_edited_attention  projection, edit and attention in one call
    cross_attention_layer   to_q, attention, to_out, bias and residual in one call, for keys and values of a prompt
    absorb_projections      those keys and values multiplied by to_q and to_out, once per prompt
    ConceptBank             the resident concepts that the operators index
    warm_up                 compiles and tunes the kernels for a model's shapes before the first request
    validate_concepts       checks of values, which operators skip for tensors on a GPU
    check_device            raises errors that kernels found: slots and indices out of range
    cache_folder            the folder of measured tile sizes and other cached results
    metric                  C⁻¹: targets in the metric, conditioning, shrinkage
    compiled_kernels        the kernels in this installation's CUDA library, or why there is none

Importing this package builds nothing, writes nothing and needs no GPU. `available_backends()` lists
the implementations of this installation, and why the others are unavailable.
"""

from . import backend, metric
from .absorption import absorb_projections
from .backend import BackendUnavailable, available_backends, use_backend
from .concept_bank import ConceptBank
from .concept_gates import concept_gates
from .cross_attention_layer import cross_attention_layer
from .device_errors import check_device
from .edited_attention import edited_attention
from .edited_projection import edited_projection
from .fused_edited_attention import fused_edited_attention
from .fused_edited_projection import fused_edited_projection
from .user_cache import cache_folder
from .validation import validate_concepts
from .warm_up import warm_up

__all__ = [
    "BackendUnavailable",
    "ConceptBank",
    "absorb_projections",
    "available_backends",
    "cache_folder",
    "compiled_kernels",
    "concept_gates",
    "check_device",
    "cross_attention_layer",
    "edited_attention",
    "edited_projection",
    "fused_edited_attention",
    "fused_edited_projection",
    "metric",
    "use_backend",
    "validate_concepts",
    "warm_up",
]

for _name in backend.ORDER[:-1]:
    backend.load(_name)
del _name

from .cuda.library import compiled_kernels  # noqa: E402
