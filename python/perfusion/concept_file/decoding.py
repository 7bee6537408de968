"""A concept out of a file's bytes, from a stranger: every name, type, shape, offset and value is checked.

What fails is a ConceptFileError.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from perfusion.base import Base
from perfusion.concept_file.format import BYTES, FORMAT, MAX_FILE_BYTES, MODELSPEC, REQUIRED, ConceptFileError, clip, digest, word_name
from perfusion.concept_file.layers import decode_layers

__all__ = ["decode"]

Made = TypeVar("Made")

MAX_HEADER_BYTES = 64 * 2**10
MAX_HEADER_DEPTH = 4
MAX_TEXT_ENCODERS = 4

_DAMAGED = "The file is damaged or was not written by Perfusion: get it again from its source."


def decode(data: bytes, make: Callable[..., Made], source: str = "concept file") -> Made:
    """What `make` makes of the fields of a concept in a file's bytes, checked; a ValueError of its own becomes a ConceptFileError.

    make: takes the fields of `Concept` as keyword arguments, with float32 arrays in place of tensors. source: names the bytes in errors.
    """
    try:
        return _decode(data, make)
    except ConceptFileError as error:
        raise ConceptFileError(f"{source}: {error}") from None


def _decode(data: bytes, make: Callable[..., Made]) -> Made:
    header, start = _read_header(data)
    metadata = _read_metadata(header.pop("__metadata__", None))
    base = _read_base(metadata, header)
    spans = _check_spans(header, _shapes(base, "key_outputs" in header), len(data) - start)
    contents = {
        name: (dtype, (end - begin) // BYTES[dtype], data[start + begin : start + end])
        for name, (dtype, begin, end) in spans.items()
    }
    if digest(metadata, contents) != metadata["perfusion.digest"]:
        raise ConceptFileError(f"the digest must match the content, and it does not. {_DAMAGED}")

    arrays = {name: _numbers(dtype, content) for name, (dtype, _, content) in contents.items()}
    words = tuple(arrays.pop(name) for name in _word_names(base))
    try:
        return make(
            name=metadata["perfusion.name"],
            superclass=metadata["perfusion.superclass"],
            base=base,
            word_embeddings=words,
            bias=_number(metadata, "perfusion.bias"),
            temperature=_number(metadata, "perfusion.temperature"),
            covariance=metadata.get("perfusion.covariance", ""),
            recipe=_json(metadata.get("perfusion.recipe", "{}")),
            created=metadata["modelspec.date"],
            license=metadata.get("modelspec.license", ""),
            author=metadata.get("modelspec.author", ""),
            **arrays,
        )
    except ConceptFileError:
        raise
    except ValueError as error:
        raise ConceptFileError(f"{clip(str(error))[1:-1]}. {_DAMAGED}") from None


def _read_header(data: bytes) -> tuple[dict[str, Any], int]:
    """The header's JSON object, and where the tensors begin."""
    if len(data) > MAX_FILE_BYTES:
        raise ConceptFileError(
            f"a concept file is at most {MAX_FILE_BYTES:,} bytes, this one is larger. {_kind(data)}"
            "Is it a model checkpoint or a LoRA? Give a file written by `perfusion train` or `perfusion convert`."
        )
    if len(data) < 10:
        raise ConceptFileError(f"a safetensors file is at least 10 bytes, this one is {len(data)}. {_DAMAGED}")
    length = struct.unpack("<Q", data[:8])[0]
    if data[8:9] != b"{":
        raise ConceptFileError(f"a safetensors header begins with '{{', this file does not. {_kind(data) or _DAMAGED}")
    if length > MAX_HEADER_BYTES:
        raise ConceptFileError(
            f"the header is at most {MAX_HEADER_BYTES:,} bytes, this one claims {length:,}. "
            "It is no concept file; LoRA and model files are larger inside."
        )
    if length > len(data) - 8:
        raise ConceptFileError(f"the header claims {length:,} bytes and the file has {len(data) - 8:,} left. {_DAMAGED}")
    try:
        text = data[8 : 8 + length].decode("utf-8")
    except UnicodeDecodeError:
        raise ConceptFileError(f"the header must be UTF-8 text, and it is not. {_DAMAGED}") from None
    return _json(text), 8 + length  # it begins with a brace, so it is an object


def _kind(data: bytes) -> str:
    """What a foreign file looks like, in words, or nothing."""
    pickled = data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if data[:4] == b"PK\x03\x04" or (pickled and data[8:9] != b"{"):
        return "It is a torch checkpoint (pickle), which is never loaded here. Import it with `perfusion convert`. "
    return ""


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _json(text: str) -> Any:
    """JSON from an untrusted file: limited depth, no double keys, no NaN."""
    depth = 0
    for bracket in re.findall(r'[\[{\]}]', re.sub(r'"(?:[^"\\]|\\.)*"', "", text, flags=re.DOTALL)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_HEADER_DEPTH:
            raise ConceptFileError(f"JSON is nested at most {MAX_HEADER_DEPTH} deep here, this is deeper. {_DAMAGED}")
    try:
        return json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConceptFileError(f"invalid JSON ({clip(str(error))}). {_DAMAGED}") from None


def _read_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ConceptFileError(
            "a concept file has metadata that maps text to text, this safetensors file has not. "
            "Is it a LoRA or a model? Give a file written by `perfusion train` or `perfusion convert`."
        )
    version = metadata.get("perfusion.format")
    if version is None:
        raise ConceptFileError(
            "it is a safetensors file, but not a concept (no perfusion.format in its metadata). "
            "Give a file written by `perfusion train` or `perfusion convert`."
        )
    if version != FORMAT:
        raise ConceptFileError(f"its format version is {clip(version)}, this Perfusion reads {FORMAT}. Update Perfusion.")
    needed = [f"perfusion.{key}" for key in REQUIRED] + [f"modelspec.{key}" for key in MODELSPEC]
    missing = [key for key in needed if key not in metadata]
    if missing:
        raise ConceptFileError(f"metadata must have {missing[0]}, and it is missing. {_DAMAGED}")
    return metadata


def _read_base(metadata: Mapping[str, str], header: Mapping[str, Any]) -> Base:
    text_widths = _text_widths(header)
    try:
        return Base(
            family=metadata["perfusion.family"],
            encoding_dim=_vector_length(header, "target") or sum(text_widths),  # a shape that is none is refused below
            text_widths=text_widths,
            layers=decode_layers(metadata["perfusion.layers"]),
            text_encoder=metadata["perfusion.text_encoder"],
        )
    except ValueError as error:
        raise ConceptFileError(f"{clip(str(error))[1:-1]}. {_DAMAGED}") from None


def _text_widths(header: Mapping[str, Any]) -> tuple[int, ...]:
    """The widths of the text encoders: the lengths of word_embedding, word_embedding_2, as far as they go."""
    widths = []
    while len(widths) < MAX_TEXT_ENCODERS and word_name(len(widths)) in header:
        widths.append(_length(header, word_name(len(widths))))
    return tuple(widths) or (_length(header, word_name(0)),)


def _length(header: Mapping[str, Any], name: str) -> int:
    """The length of a vector, as the header says it."""
    if name not in header:
        raise ConceptFileError(f"the tensors must include {name}, and it is missing. {_DAMAGED}")
    length = _vector_length(header, name)
    if length is None:
        shape = header[name].get("shape") if isinstance(header[name], dict) else None
        raise ConceptFileError(f"{name} must have a shape of one number, got {clip(shape)}. {_DAMAGED}")
    return length


def _vector_length(header: Mapping[str, Any], name: str) -> int | None:
    entry = header.get(name)
    shape = entry.get("shape") if isinstance(entry, dict) else None
    return shape[0] if _integers(shape, 1) and shape[0] > 0 else None


def _word_names(base: Base) -> list[str]:
    return [word_name(i) for i in range(len(base.text_widths))]


def _shapes(base: Base, key_outputs: bool) -> dict[str, int]:
    """Which tensors a file for this base holds, and how long each is."""
    sizes = {"value_outputs": base.outputs}
    sizes |= dict.fromkeys(("target", "metric_target", "superclass_encoding"), base.encoding_dim)
    if key_outputs:
        sizes["key_outputs"] = base.outputs
    return {**sizes, **dict(zip(_word_names(base), base.text_widths))}


def _check_spans(header: Mapping[str, Any], sizes: Mapping[str, int], space: int) -> dict[str, tuple[str, int, int]]:
    """name -> (dtype, begin, end) of each tensor, after checking that they are the known ones and fill the file exactly."""
    if set(header) != set(sizes):
        missing, extra = sorted(set(sizes) - set(header)), sorted(set(header) - set(sizes))
        came = f"{clip(extra[0])} is not one of them" if extra else f"{missing[0]} is missing"
        raise ConceptFileError(f"the tensors must be {', '.join(sizes)}; {came}. {_DAMAGED}")
    spans = {}
    for name, entry in header.items():
        entry = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in BYTES:
            raise ConceptFileError(f"{name} must be {', '.join(BYTES)}, got {clip(dtype)}. {_DAMAGED}")
        if not _integers(shape, 1) or shape[0] != sizes[name]:
            raise ConceptFileError(f"{name} must have shape [{sizes[name]}] for this base, got {clip(shape)}. {_DAMAGED}")
        if not _integers(offsets, 2) or offsets[1] - offsets[0] != sizes[name] * BYTES[dtype]:
            raise ConceptFileError(f"{name} must span {sizes[name]} numbers of {dtype}, got offsets {clip(offsets)}. {_DAMAGED}")
        spans[name] = (dtype, *offsets)
    end = 0
    for name, (_, begin, stop) in sorted(spans.items(), key=lambda item: item[1][1]):
        if begin != end:
            raise ConceptFileError(f"tensors must lie back to back; {name} begins at {begin:,}, not {end:,}. {_DAMAGED}")
        end = stop
    if end != space:
        what = "cut short" if end > space else "followed by other data"
        raise ConceptFileError(f"the tensors take {end:,} bytes and the file has {space:,}: it is {what}. {_DAMAGED}")
    return spans


def _numbers(dtype: str, content: bytes) -> np.ndarray:
    """float32, exactly the numbers that are there."""
    if dtype == "BF16":  # the upper half of a float32, which numpy has no name for
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(content, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


def _integers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(v) is int and 0 <= v <= MAX_FILE_BYTES for v in value)


def _number(metadata: Mapping[str, str], key: str) -> float:
    text = metadata[key]
    if not re.fullmatch(r"-?\d{1,20}(\.\d{1,20})?(e-?\d{1,3})?", text, re.ASCII):
        raise ConceptFileError(f"{key} must be a number, got {clip(text)}. {_DAMAGED}")
    return float(text)
