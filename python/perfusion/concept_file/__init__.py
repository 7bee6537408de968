"""The concept file: one safetensors file per concept, small, checked before it is believed.

A file from a stranger is safe to read: nothing is unpickled, sizes are limited before anything is allocated, and every
name, type, shape, offset and value is checked. What fails is a ConceptFileError. Reading needs numpy alone.

    format.py       what writing and reading agree upon
    layers.py       layer names in few bytes
    encoding.py     a concept's bytes
    decoding.py     a concept out of bytes, and everything that may be wrong with them
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from perfusion.concept_file.decoding import decode
from perfusion.concept_file.format import MAX_FILE_BYTES, ConceptFileError
from perfusion.concept_file.layers import decode_layers, encode_layers

__all__ = ["ConceptFileError", "decode", "decode_layers", "encode_layers", "read_bytes"]


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes, as many as a concept can have. ConceptFileError when it is no regular file; OSError."""
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise ConceptFileError(f"{path}: a concept is one file, and this is not a regular file. Give the .safetensors file.")
    with open(path, "rb") as file:
        return file.read(MAX_FILE_BYTES + 1)
