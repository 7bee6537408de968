"""Import of checkpoints that two public ports of the method write.

    checkpoint.py   the file, from a stranger
    layouts.py      which port's it is, and what it holds
    layers.py       which output belongs to which layer
    fitting.py      s, out of the locked keys
    gates.py        one output, out of one per token position
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from perfusion.base import Base, denoiser, describe_base, text_projection
from perfusion.concept import Concept, check_name
from perfusion.convert import checkpoint
from perfusion.convert.checkpoint import ConversionError
from perfusion.convert.fitting import fit, projection_weights, superclass_encoding
from perfusion.convert.gates import Reader, collapse, training_gates
from perfusion.convert.layouts import Found, find
from perfusion.errors import advise
from perfusion.files import user_path
from perfusion.settings import BIAS, TEMPERATURE

if TYPE_CHECKING:
    from perfusion.covariance import Covariance

__all__ = ["Conversion", "ConversionError", "convert"]

# The word stands at token 2, 4, 5 or 6, as it does in short training captions.
TEMPLATES = ("a {}", "a photo of {}", "picture of a {}", "a photo of a {}", "a picture of the {}", "a nice photo of the {}")
UNTRAINED = 1e-3  # relative residual below which values are nothing but W_V times some encoding


class Conversion(NamedTuple):
    """A converted concept, and in `notes` what was found and what was approximated, a sentence each."""

    concept: Concept
    notes: list[str]


def convert(
    path: str | os.PathLike[str],
    pipe: Any,
    *,
    name: str,
    superclass: str | None = None,
    covariance: Covariance | None = None,
    index: int | None = None,
    templates: Sequence[str] = TEMPLATES,
    bias: float = BIAS.default,
    temperature: float = TEMPERATURE.default,
    license: str = "",
    author: str = "",
) -> Conversion:
    """A concept from a checkpoint of one of the two ports.

    path         the checkpoint
    pipe         the diffusers pipeline of the base model it was trained on: its weights give s, its text encoder the check
    name         of the concept
    superclass   one word; may be left out when the checkpoint says it
    covariance   for checkpoints without C^-1 only
    index        which concept, when the checkpoint holds several
    templates    prompts with {} at the word: where the concept is expected to stand
    bias, temperature, license, author   as in Concept

    Raises ConversionError when the file is none of the known layouts or does not belong to this pipeline, ValueError for
    a field that Concept refuses, UnsupportedPipeline, OSError.
    """
    check_name(name)
    if isinstance(pipe, Base):
        raise ConversionError("a Base is not enough: s comes from the UNet's key weights. Give the pipeline itself.")
    base = describe_base(pipe)
    if len(base.text_widths) != 1:
        raise ConversionError(f"these checkpoints hold one word embedding, but {base} needs one for each of its text encoders.")
    if text_projection(denoiser(pipe)) is not None:
        raise ConversionError(f"these checkpoints are of UNets that read the text encoder's output directly, and {base} does not.")
    found = find(checkpoint.load(user_path(path)), pipe, base, index)
    notes = [f"Checkpoint of {found.port}.", *found.notes]
    superclass = superclass or found.superclass
    if not superclass:
        raise advise(
            ConversionError("the checkpoint does not say its superclass."),
            python="Give it, for example superclass='teddy'.",
            command="Give it, for example --superclass teddy.",
        )

    metric_target, fingerprint = _metric_target(found, covariance, base)
    reader = Reader(pipe)
    gates, similarity = training_gates(reader, found, metric_target, templates)
    notes.append(f"Similarity c at the concept word, in {len(templates)} prompts: {similarity:.3f} (1 is ideal).")
    values, keys = (collapse(rows, gates, notes, kind) for rows, kind in ((found.values, "values"), (found.keys, "keys")))

    s, key_outputs = superclass_encoding(pipe, keys, notes)
    if key_outputs is not None:
        s = reader.superclass_encoding(superclass, templates)
        notes.append(f"s is the mean encoding at the word {superclass!r}.")
    if fit(projection_weights(pipe, "to_v"), values)[1] < UNTRAINED:
        notes.append(
            "Warning: the values are W_V times one encoding, as at the start of training. The port never trained them "
            "(they were left out of its optimiser), so this concept will look like its superclass."
        )
    concept = Concept(
        name=name,
        superclass=superclass,
        base=base,
        value_outputs=values.float(),
        target=found.target.float(),
        metric_target=metric_target.float(),
        superclass_encoding=s.float(),
        word_embeddings=(found.word.float(),),
        key_outputs=None if key_outputs is None else key_outputs.float(),
        bias=bias,
        temperature=temperature,
        covariance=fingerprint,
        recipe=found.recipe,
        license=license,
        author=author,
    )
    return Conversion(concept, notes)


def _metric_target(found: Found, covariance: Covariance | None, base: Base) -> tuple[Tensor, str]:
    """C^-1 i* [D], and the fingerprint of C."""
    if found.inverse is not None:
        metric = found.inverse @ found.target
        fingerprint = "inverse-" + hashlib.sha256(found.inverse.float().numpy().tobytes()).hexdigest()[:16]
    elif covariance is not None:
        metric, fingerprint = covariance.metric_targets(found.target).double(), covariance.fingerprint
    else:
        raise advise(
            ConversionError("the checkpoint holds no C^-1."),
            python="Give the text encoder's covariance; get_covariance(pipe) of perfusion.covariance finds or computes it.",
            command="Give the text encoder's with --covariance FILE; `perfusion covariance --output FILE` finds or computes it.",
        )
    if not torch.dot(found.target, metric) > 0:
        raise ConversionError("the energy i* . C^-1 i* is not positive: C^-1 is not the inverse of a covariance.")
    return metric, fingerprint
