"""Finds which port wrote a checkpoint, and what it holds of a concept.

    lucidrains/perfusion-pytorch, `save`:   {embed_params [n, width] or None, key_value_params, C_inv [D, D]}, where
                                            key_value_params lists (i* [n, D], o* [n, d]) per edited projection, in the
                                            order of the model's modules: to_k, to_v of the first layer, and so on
    lucidrains/perfusion-pytorch, a model's
    state dict:                             ...attn2.to_v.concept_outputs [n, d], ....ema_concept_text_encs [n, D],
                                            ....C_inv [D, D], and the embedding wrapper's concepts [n, width]
    ChenDarYen/Key-Locked-Rank-One-Editing-for-Text-to-Image-Personalization:
                                            {global_step, C_inv [D, D], target_input [D], embedding, target_output}, where
                                            target_output maps ...attn2.to_v.target_output to one o* [77, d] per *token
                                            position*, under the layer names of the original Stable Diffusion code
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from perfusion.base import Base, text_encoders
from perfusion.convert import checkpoint
from perfusion.convert.checkpoint import ConversionError
from perfusion.convert.layers import assign, by_layer, layer_paths

__all__ = ["CHENDARYEN", "LUCIDRAINS", "Found", "find"]

LUCIDRAINS = "lucidrains/perfusion-pytorch"
CHENDARYEN = "ChenDarYen/Key-Locked-Rank-One-Editing"
LARGEST_SPREAD = 0.05  # of i* over the layers, relative; it is one vector by definition


@dataclasses.dataclass
class Found:
    """What a checkpoint holds, in one form for all layouts. R rows: one output per token position, or R = 1."""

    port: str
    target: Tensor  # [D]
    inverse: Tensor | None  # [D, D], C^-1
    word: Tensor  # [width]
    keys: dict[str, Tensor]  # layer -> [R, d], in the base's layer order
    values: dict[str, Tensor]  # likewise
    superclass: str | None = None
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def find(content: Any, pipe: Any, base: Base, index: int | None) -> Found:
    """What a checkpoint's content holds of one concept. ConversionError when it is none of the known layouts, or does not fit."""
    if isinstance(content, Mapping):
        if {"target_input", "target_output", "embedding"} <= set(content):
            if index not in (None, 0):
                raise ConversionError(f"the checkpoint holds one concept, so index must be 0, got {index}.")
            return _find_chendaryen(content, pipe, base)
        if "key_value_params" in content:
            return _find_package(content, pipe, base, index)
        state = content.get("state_dict", content)
        if isinstance(state, Mapping) and any(str(key).endswith("ema_concept_text_encs") for key in state):
            return _find_state(state, pipe, base, index)
    keys = ", ".join(sorted(ascii(key) for key in content)[:8]) if isinstance(content, Mapping) else type(content).__name__
    raise ConversionError(
        f"not a checkpoint of a known port; at its top it holds: {keys:.300}. "
        f"Known are {LUCIDRAINS} (`save`, or a state dict) and {CHENDARYEN}."
    )


def _find_chendaryen(content: Mapping[str, Any], pipe: Any, base: Base) -> Found:
    embedding, outputs = content["embedding"], content["target_output"]
    if not isinstance(embedding, Mapping) or not isinstance(outputs, Mapping):
        raise ConversionError("embedding and target_output must be dictionaries.")
    words = checkpoint.parameters(embedding.get("string_to_param"))
    if len(words) != 1:
        raise ConversionError(f"the checkpoint must hold one placeholder word, it holds {len(words)}.")
    word = next(iter(words.values()))
    if isinstance(word, Tensor) and word.dim() == 2 and len(word) != 1:
        raise ConversionError(f"the placeholder has {len(word)} embeddings (num_vectors_per_token); a concept has one.")
    positions = text_encoders(pipe)[0][0].model_max_length
    layers, paths = {}, layer_paths(pipe)
    for projection in ("to_k", "to_v"):
        by_path = {
            key.removesuffix(f".{projection}.target_output"): value
            for key, value in outputs.items()
            if isinstance(key, str) and key.endswith(f".{projection}.target_output")
        }
        layers[projection] = {
            layer: checkpoint.tensor(rows, f"{projection} output of {layer}", (positions, base.layers[layer]))
            for layer, rows in by_layer(by_path, paths, base, f"{projection}.target_output").items()
        }
    step = content.get("global_step")
    initial = checkpoint.texts(embedding.get("initializer_words"))
    return Found(
        port=CHENDARYEN,
        target=checkpoint.tensor(content["target_input"], "target_input", (base.encoding_dim,)),
        inverse=_optional_square(content.get("C_inv"), base),
        word=checkpoint.tensor(word, "the placeholder's embedding", (1, base.text_widths[0]))[0],
        keys=layers["to_k"],
        values=layers["to_v"],
        superclass=initial[0] if len(initial) == 1 else None,
        recipe={"source": CHENDARYEN, **({"steps": step} if type(step) is int and 0 <= step < 10**9 else {})},
    )


def _find_package(content: Mapping[str, Any], pipe: Any, base: Base, index: int | None) -> Found:
    pairs = content["key_value_params"]
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise ConversionError("key_value_params must be a list of pairs (i*, o*).")
    if len(pairs) != 2 * len(base.layers):
        raise ConversionError(
            f"key_value_params has {len(pairs)} entries, and {base} needs {2 * len(base.layers)}: a key and a value output "
            "per layer. Was every cross-attention layer wired, with both projections, and on this model?"
        )
    if content.get("embed_params") is None:
        raise ConversionError("embed_params is None: the word's embedding was not saved (no EmbeddingWrapper), and i* belongs to it.")
    count = _count(content["embed_params"], index)
    chosen = 0 if index is None else index
    targets = [checkpoint.tensor(pair[0], "i*", (count, base.encoding_dim))[chosen] for pair in pairs]
    outputs = [checkpoint.tensor(pair[1], "o*", (count, None))[chosen : chosen + 1] for pair in pairs]
    target, notes = _one_target(targets)
    keys, values = assign(outputs, pipe, base)
    return Found(
        port=LUCIDRAINS,
        target=target,
        inverse=_optional_square(content.get("C_inv"), base),
        word=checkpoint.tensor(content["embed_params"], "embed_params", (count, base.text_widths[0]))[chosen],
        keys=keys,
        values=values,
        recipe={"source": LUCIDRAINS},
        notes=notes,
    )


def _find_state(state: Mapping[str, Any], pipe: Any, base: Base, index: int | None) -> Found:
    state = {str(key): value for key, value in state.items()}
    words = [value for key, value in state.items() if key.rsplit(".", 1)[-1] == "concepts"]
    if len(words) != 1:
        raise ConversionError(f"the state dict must hold one embedding wrapper's 'concepts', it holds {len(words)}.")
    count = _count(words[0], index)
    chosen = 0 if index is None else index
    paths, found, targets = layer_paths(pipe), {}, []
    for projection in ("to_k", "to_v"):
        outputs = {}
        # The output's name changed over the port's history; what it means did not.
        for suffix in ("concept_outputs", "concept_output", "superclass_output"):
            ending = f".{projection}.{suffix}"
            outputs |= {key.removesuffix(ending): value for key, value in state.items() if key.endswith(ending)}
        found[projection] = {
            layer: checkpoint.tensor(value, f"{projection} output of {layer}", (count, base.layers[layer]))[chosen : chosen + 1]
            for layer, value in by_layer(outputs, paths, base, f"{projection}.concept_outputs").items()
        }
    for key, value in state.items():
        if key.endswith("ema_concept_text_encs"):
            targets.append(checkpoint.tensor(value, key, (count, base.encoding_dim))[chosen])
    inverses = [value for key, value in state.items() if key.rsplit(".", 1)[-1] == "C_inv"]
    target, notes = _one_target(targets)
    return Found(
        port=LUCIDRAINS,
        target=target,
        inverse=_optional_square(inverses[0] if inverses else None, base),
        word=checkpoint.tensor(words[0], "concepts", (count, base.text_widths[0]))[chosen],
        keys=found["to_k"],
        values=found["to_v"],
        recipe={"source": LUCIDRAINS},
        notes=notes,
    )


def _count(words: Any, index: int | None) -> int:
    """How many concepts a checkpoint holds; refuses an `index` that it has not, and several without an `index`."""
    count = len(words) if isinstance(words, Tensor) and words.dim() == 2 else 1
    if index is None and count != 1:
        raise ConversionError(f"the checkpoint holds {count} concepts. Choose one by index, 0 to {count - 1}.")
    if index is not None and not 0 <= index < count:
        plural = "" if count == 1 else "s"
        raise ConversionError(f"the checkpoint holds {count} concept{plural}, so index must be 0 to {count - 1}, got {index}.")
    return count


def _optional_square(value: Any, base: Base) -> Tensor | None:
    return None if value is None else checkpoint.tensor(value, "C_inv", (base.encoding_dim, base.encoding_dim))


def _one_target(targets: list[Tensor]) -> tuple[Tensor, list[str]]:
    """The one i*: its mean over the layers, which the port keeps separately. [D]"""
    target = torch.stack(targets).mean(0)
    if not target.any():
        raise ConversionError("i* is zero: this concept was never trained.")
    spread = max((one - target).norm() / target.norm() for one in targets)
    if spread > LARGEST_SPREAD:
        raise ConversionError(f"i* must be one vector, but the layers' differ by {spread:.1%}. The layers were not trained together.")
    if spread > 1e-5:
        return target, [f"Approximated: i* is the mean over the layers, which differ by up to {spread:.2%}."]
    return target, []
