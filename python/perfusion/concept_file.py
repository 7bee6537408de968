"""The concept file: one safetensors file per concept, small, checked before it is believed.

Layout (format 1). Header: eight bytes of length, then JSON, padded with spaces to a multiple of eight; then the tensors
back to back.

    value_outputs [O]   target [D]   metric_target [D]   superclass_encoding [D]
    word_embedding [width]   word_embedding_2 [width] with two text encoders   key_outputs [O] without the key lock

in F16, BF16 or F32. Metadata: the `modelspec.*` keys of the Stability AI model metadata standard 1.0.1, and `perfusion.*`
(see `_metadata`). `perfusion.digest` covers all of it, so a damaged file is never taken for a concept.

SD 1.5 in float16: 31,104 bytes of numbers and at most 1,656 of everything else, 32 KiB together.

A file from a stranger is safe to read: nothing is unpickled, sizes are limited before anything is allocated, and every
name, type, shape, offset and value is checked. What fails is a ConceptFileError.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perfusion.advice import advise
from perfusion.base import Base
from perfusion.concept import Concept
from perfusion.files import whole

__all__ = ["ConceptFileError", "decode_layers", "encode_layers", "read", "write"]

FORMAT = "1"
MAX_FILE_BYTES = 4 * 2**20
MAX_HEADER_BYTES = 64 * 2**10
MAX_HEADER_DEPTH = 4
MAX_LAYERS = 1024
MAX_TEXT_ENCODERS = 4

ARCHITECTURES = {
    "sd1": "stable-diffusion-v1/perfusion",
    "sd2": "stable-diffusion-v2/perfusion",
    "sdxl": "stable-diffusion-xl-v1-base/perfusion",
    "custom": "custom/perfusion",
}
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# Largest rounding error that a save may make, relative to a tensor's norm: twice what the type's mantissa gives.
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}
ENERGY_ROUNDING = 0.01  # largest change of i* . C^-1 i* that a save may make, relative; float16 makes about 5e-5

REQUIRED = ("format", "name", "superclass", "family", "text_encoder", "layers", "bias", "temperature", "digest")
OPTIONAL = ("covariance", "recipe")
MODELSPEC = ("sai_model_spec", "architecture", "implementation", "title", "date")
MODELSPEC_OPTIONAL = ("author", "license")


class ConceptFileError(ValueError):
    """A file that is not a concept this version can use. Says what is wrong, by which rule, what came, and what to do."""


_DAMAGED = "The file is damaged or was not written by Perfusion: get it again from its source."


def _clip(value: Any) -> str:
    """A value from an untrusted file, safe to print."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


# Layers in few bytes

_PATTERNS = (
    (re.compile(r"down_blocks\.(\d+)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2"), "d"),
    (re.compile(r"up_blocks\.(\d+)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2"), "u"),
    (re.compile(r"mid_block\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2"), "m"),
)
_SHORT = re.compile(r"(?:([du])(0|[1-9]\d{0,2})\.|m)(0|[1-9]\d{0,2})\.(0|[1-9]\d{0,2})")
_FULL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")


def _short_name(name: str) -> str:
    for pattern, letter in _PATTERNS:
        match = pattern.fullmatch(name)
        if match:
            return letter + ".".join(match.groups())
    return name


def _long_name(text: str) -> str | None:
    match = _SHORT.fullmatch(text)
    if match is None:
        return text if _FULL.fullmatch(text) and len(text) <= 128 and _short_name(text) == text else None
    letter, block, attention, transformer = match.groups()
    place = {"d": f"down_blocks.{block}", "u": f"up_blocks.{block}", None: "mid_block"}[letter]
    return f"{place}.attentions.{attention}.transformer_blocks.{transformer}.attn2"


def encode_layers(layers: Mapping[str, int]) -> str:
    """Layer names and widths as short text: "d0.0.0=320 d0.1.0 d1.0.0=640 ...".

    d0.1.2 is down_blocks.0.attentions.1.transformer_blocks.2.attn2, u the same in up_blocks, m0.0 in mid_block; any other
    name stands in full. A width stands where it changes. ValueError for names that do not survive the way back.
    """
    words, last = [], None
    for name, width in layers.items():
        words.append(_short_name(name) + ("" if width == last else f"={width}"))
        last = width
    text = " ".join(words)
    try:
        faithful = list(decode_layers(text).items()) == list(layers.items())
    except ValueError:
        faithful = False
    if not faithful:
        raise ValueError(f"layer names must be dotted module names, at most {MAX_LAYERS} of them, got {_clip(list(layers))}")
    return text


def decode_layers(text: str) -> dict[str, int]:
    """The layers that `encode_layers` wrote, in order. ValueError on anything else."""
    layers: dict[str, int] = {}
    width = 0
    words = text.split(" ")
    if len(words) > MAX_LAYERS:
        raise ValueError(f"at most {MAX_LAYERS} layers, got {len(words)}")
    for word in words:
        short, equals, digits = word.partition("=")
        if equals:
            if not re.fullmatch(r"[1-9]\d{0,5}", digits, re.ASCII):
                raise ValueError(f"layer width must be a number from 1 to 999999, got {_clip(digits)}")
            width = int(digits)
        name = _long_name(short)
        if name is None or name in layers or not width:
            raise ValueError(f"not a layer name, or one too many, or one without a width: {_clip(word)}")
        layers[name] = width
    return layers


# Writing


def _tensors(concept: Concept) -> dict[str, Tensor]:
    tensors = concept._single_tensors()
    for i, word in enumerate(concept.word_embeddings):
        tensors[_word_name(i)] = word
    return dict(sorted(tensors.items()))


def _metadata(concept: Concept) -> dict[str, str]:
    """All metadata but the digest. Optional keys are left out when empty."""
    base = concept.base
    recipe = json.dumps(concept.recipe, ensure_ascii=False, separators=(",", ":")) if concept.recipe else ""
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURES[base.family],
        "modelspec.implementation": "diffusers",
        "modelspec.title": concept.name,
        "modelspec.date": concept.created,
        "modelspec.author": concept.author,
        "modelspec.license": concept.license,
        "perfusion.format": FORMAT,
        "perfusion.name": concept.name,
        "perfusion.superclass": concept.superclass,
        "perfusion.family": base.family,
        "perfusion.text_encoder": base.text_encoder,
        "perfusion.layers": encode_layers(base.layers),
        "perfusion.covariance": concept.covariance,
        "perfusion.bias": repr(float(concept.bias)),
        "perfusion.temperature": repr(float(concept.temperature)),
        "perfusion.recipe": recipe,
    }
    return {key: value for key, value in metadata.items() if value}


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, int, bytes]]) -> str:
    """64 bits over every known metadata value and every tensor's name, type, size and bytes."""
    known = [f"perfusion.{key}" for key in REQUIRED + OPTIONAL if key != "digest"]
    known += [f"modelspec.{key}" for key in MODELSPEC + MODELSPEC_OPTIONAL]
    listed = {key: metadata[key] for key in sorted(known) if key in metadata}
    digest = hashlib.blake2b(json.dumps(listed, sort_keys=True).encode("ascii"), digest_size=8)
    for name, (dtype, size, data) in sorted(tensors.items()):
        digest.update(f"|{name} {dtype} {size}|".encode("ascii"))
        digest.update(data)
    return digest.hexdigest()


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    exact = tensor.cpu().double()
    rounded = tensor.cpu().to(dtype)
    error, norm = (rounded.double() - exact).norm().item(), exact.norm().item()
    if not math.isfinite(error) or error > ROUNDING[dtype] * norm:
        largest = exact.abs().max().item()
        raise _in_float32(
            f"{name} does not fit {str(dtype).removeprefix('torch.')}: its largest entry is {largest:.3g}, and rounding would "
            f"change it by {error / max(norm, 1e-300):.2g} of its norm."
        )
    return rounded


def _in_float32(what: str) -> ValueError:
    return advise(
        ValueError(what),
        python="Save with dtype=torch.float32.",
        command="A training with a lower --learning-rate keeps it small; where a checkpoint is converted, --dtype float32 holds it.",
    )


def encode(concept: Concept, dtype: torch.dtype = torch.float16) -> bytes:
    """The concept file's bytes; equal concepts give equal bytes. ValueError when a tensor does not fit `dtype`."""
    if dtype not in DTYPES.values():
        raise ValueError(f"a concept file holds float16, bfloat16 or float32, got {dtype}")
    rounded = {name: _rounded(name, tensor, dtype) for name, tensor in _tensors(concept).items()}
    energy = torch.dot(rounded["target"].double(), rounded["metric_target"].double()).item()
    if abs(energy - concept.energy) > ENERGY_ROUNDING * concept.energy:
        raise _in_float32(
            f"the energy target . metric_target does not survive {str(dtype).removeprefix('torch.')}: "
            f"{concept.energy:.4g} would become {energy:.4g}."
        )
    label = next(label for label, known in DTYPES.items() if known == dtype)
    data = {name: (label, len(tensor), tensor.view(torch.uint8).numpy().tobytes()) for name, tensor in rounded.items()}
    metadata = _metadata(concept)
    metadata["perfusion.digest"] = _digest(metadata, data)

    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (label, size, content) in data.items():
        header[name] = {"dtype": label, "shape": [size], "data_offsets": [end, end + len(content)]}
        end += len(content)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(content for _, _, content in data.values())


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


# Reading


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


def decode(data: bytes, source: str = "concept file") -> Concept:
    """A concept from a file's bytes; `source` names them in errors. ConceptFileError as `read`."""
    try:
        return _decode(data)
    except ConceptFileError as error:
        raise ConceptFileError(f"{source}: {error}") from None


def _decode(data: bytes) -> Concept:
    header, start = _read_header(data)
    metadata = _read_metadata(header.pop("__metadata__", None))
    base = _read_base(metadata, header)
    spans = _check_spans(header, _shapes(base, "key_outputs" in header), len(data) - start)
    contents = {
        name: (dtype, (end - begin) // DTYPES[dtype].itemsize, data[start + begin : start + end])
        for name, (dtype, begin, end) in spans.items()
    }
    if _digest(metadata, contents) != metadata["perfusion.digest"]:
        raise ConceptFileError(f"the digest must match the content, and it does not. {_DAMAGED}")

    import safetensors.torch

    try:
        tensors = {name: tensor.float() for name, tensor in safetensors.torch.load(data).items()}
    except Exception as error:  # whatever safetensors still finds wrong: its errors have no common base of their own
        raise ConceptFileError(f"safetensors cannot read it: {_clip(str(error))}. {_DAMAGED}") from None
    words = tuple(tensors.pop(name) for name in _word_names(base))
    try:
        return Concept(
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
            **tensors,
        )
    except ConceptFileError:
        raise
    except ValueError as error:
        raise ConceptFileError(f"{_clip(str(error))[1:-1]}. {_DAMAGED}") from None


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
        raise ConceptFileError(f"invalid JSON ({_clip(str(error))}). {_DAMAGED}") from None


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
        raise ConceptFileError(f"its format version is {_clip(version)}, this Perfusion reads {FORMAT}. Update Perfusion.")
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
            encoding_dim=sum(text_widths),
            text_widths=text_widths,
            layers=decode_layers(metadata["perfusion.layers"]),
            text_encoder=metadata["perfusion.text_encoder"],
        )
    except ValueError as error:
        raise ConceptFileError(f"{_clip(str(error))[1:-1]}. {_DAMAGED}") from None


def _text_widths(header: Mapping[str, Any]) -> tuple[int, ...]:
    """The widths of the text encoders: the lengths of word_embedding, word_embedding_2, as far as they go."""
    widths = []
    while len(widths) < MAX_TEXT_ENCODERS and _word_name(len(widths)) in header:
        entry = header[_word_name(len(widths))]
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not _integers(shape, 1) or shape[0] < 1:
            raise ConceptFileError(f"{_word_name(len(widths))} must have a shape of one number, got {_clip(shape)}. {_DAMAGED}")
        widths.append(shape[0])
    if not widths:
        raise ConceptFileError(f"the tensors must include word_embedding, and it is missing. {_DAMAGED}")
    return tuple(widths)


def _word_name(index: int) -> str:
    return "word_embedding" if index == 0 else f"word_embedding_{index + 1}"


def _word_names(base: Base) -> list[str]:
    return [_word_name(i) for i in range(len(base.text_widths))]


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
        came = f"{_clip(extra[0])} is not one of them" if extra else f"{missing[0]} is missing"
        raise ConceptFileError(f"the tensors must be {', '.join(sizes)}; {came}. {_DAMAGED}")
    spans = {}
    for name, entry in header.items():
        entry = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ConceptFileError(f"{name} must be {', '.join(DTYPES)}, got {_clip(dtype)}. {_DAMAGED}")
        if not _integers(shape, 1) or shape[0] != sizes[name]:
            raise ConceptFileError(f"{name} must have shape [{sizes[name]}] for this base, got {_clip(shape)}. {_DAMAGED}")
        if not _integers(offsets, 2) or offsets[1] - offsets[0] != sizes[name] * DTYPES[dtype].itemsize:
            raise ConceptFileError(f"{name} must span {sizes[name]} numbers of {dtype}, got offsets {_clip(offsets)}. {_DAMAGED}")
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


def _integers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(v) is int and 0 <= v <= MAX_FILE_BYTES for v in value)


def _number(metadata: Mapping[str, str], key: str) -> float:
    text = metadata[key]
    if not re.fullmatch(r"-?\d{1,20}(\.\d{1,20})?(e-?\d{1,3})?", text, re.ASCII):
        raise ConceptFileError(f"{key} must be a number, got {_clip(text)}. {_DAMAGED}")
    return float(text)
