"""What a diffusers pipeline is made of, as far as a concept is concerned.

A concept is a set of vectors for one *base*: text encoders of certain widths and weights, and a UNet with certain
cross-attention layers. Nothing here changes a pipeline, and importing this package imports neither torch nor diffusers.

    parts.py        finds text encoders, the denoiser and its cross-attention layers
    text_projection.py  what a denoiser does to the text before these read it
    dense.py        weights that may be quantised
    fingerprint.py  a signature of the text encoders' weights
    record.py       Base, and how two of them differ
    support.py      describes a pipeline, and refuses by name what cannot be edited
"""

from perfusion.base.fingerprint import fingerprints_match, text_encoder_fingerprint
from perfusion.base.parts import cross_attention_layers, denoiser, layer_width, text_encoders
from perfusion.base.record import Base
from perfusion.base.support import check_supported, describe_base
from perfusion.base.text_projection import project_text, text_input_width, text_projection
from perfusion.errors import UnsupportedPipeline

__all__ = [
    "Base",
    "UnsupportedPipeline",
    "check_supported",
    "cross_attention_layers",
    "denoiser",
    "describe_base",
    "fingerprints_match",
    "layer_width",
    "project_text",
    "text_encoder_fingerprint",
    "text_encoders",
    "text_input_width",
    "text_projection",
]
