"""What the concept file holds, format 1: where, under which names, and the digest over all of it.

Header: eight bytes of length, then JSON, padded with spaces to a multiple of eight; then the tensors
back to back.

    value_outputs [O]   target [D]   metric_target [D]   superclass_encoding [D]
    word_embedding [width]   word_embedding_2 [width] with two text encoders   key_outputs [O] without the key lock

in F16, BF16 or F32. Metadata: the `modelspec.*` keys of the Stability AI model metadata standard 1.0.1, and `perfusion.*`
(see `encoding._metadata`). `perfusion.digest` covers all of it, so a damaged file is never taken for a concept.

D is the width that cross-attention reads, and a word has that of its text encoder. How large a file is at most, `Family.file_bytes`
says: for SD 1.5 in float16 31,104 bytes of numbers and at most 1,656 of everything else, 32 KiB together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = [
    "BYTES",
    "FORMAT",
    "MAX_FILE_BYTES",
    "MODELSPEC",
    "MODELSPEC_OPTIONAL",
    "OPTIONAL",
    "REQUIRED",
    "ConceptFileError",
    "clip",
    "digest",
    "word_name",
]

FORMAT = "1"
MAX_FILE_BYTES = 4 * 2**20
BYTES = {"F16": 2, "BF16": 2, "F32": 4}  # of a number, by its type

REQUIRED = ("format", "name", "superclass", "family", "text_encoder", "layers", "bias", "temperature", "digest")
OPTIONAL = ("covariance", "recipe")
MODELSPEC = ("sai_model_spec", "architecture", "implementation", "title", "date")
MODELSPEC_OPTIONAL = ("author", "license")


class ConceptFileError(ValueError):
    """A file that is not a concept this version can use. Says what is wrong, by which rule, what came, and what to do."""


def clip(value: Any) -> str:
    """A value from an untrusted file, safe to print."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def word_name(index: int) -> str:
    return "word_embedding" if index == 0 else f"word_embedding_{index + 1}"


def digest(metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, int, bytes]]) -> str:
    """64 bits over every known metadata value and every tensor's name, type, size and bytes."""
    known = [f"perfusion.{key}" for key in REQUIRED + OPTIONAL if key != "digest"]
    known += [f"modelspec.{key}" for key in MODELSPEC + MODELSPEC_OPTIONAL]
    listed = {key: metadata[key] for key in sorted(known) if key in metadata}
    digest = hashlib.blake2b(json.dumps(listed, sort_keys=True).encode("ascii"), digest_size=8)
    for name, (dtype, size, data) in sorted(tensors.items()):
        digest.update(f"|{name} {dtype} {size}|".encode("ascii"))
        digest.update(data)
    return digest.hexdigest()
