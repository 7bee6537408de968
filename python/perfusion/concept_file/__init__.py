"""The concept file: one safetensors file per concept, small, checked before it is believed.

A file from a stranger is safe to read: nothing is unpickled, sizes are limited before anything is allocated, and every
name, type, shape, offset and value is checked. What fails is a ConceptFileError.

    format.py       what writing and reading agree upon
    layers.py       layer names in few bytes
    encoding.py     a concept's bytes
    decoding.py     a concept out of bytes, and everything that may be wrong with them
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import torch

from perfusion.concept import Concept
from perfusion.concept_file.decoding import decode
from perfusion.concept_file.encoding import encode
from perfusion.concept_file.format import MAX_FILE_BYTES, ConceptFileError
from perfusion.concept_file.layers import decode_layers, encode_layers
from perfusion.files import whole

__all__ = ["ConceptFileError", "decode_layers", "encode_layers", "read", "write"]


def write(concept: Concept, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
    """Writes the file, or leaves what was there.

    The bytes are read back by `decode` first, written beside the file under a temporary name, and renamed over it. Missing
    folders are made. ValueError when the concept does not fit `dtype`, OSError from the file system.
    """
    path = Path(path)
    data = encode(concept, dtype)
    decode(data, source=str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as draft, open(draft, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read(path: str | os.PathLike[str]) -> Concept:
    """Reads and checks a concept file. Tensors come as float32 on the CPU.

    ConceptFileError when it is not a concept file, damaged, hostile, or of another format version; OSError when it cannot
    be opened.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise ConceptFileError(f"{path}: a concept is one file, and this is not a regular file. Give the .safetensors file.")
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    return decode(data, source=str(path))
