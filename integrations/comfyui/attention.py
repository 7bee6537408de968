"""Concepts in a ComfyUI model: the edit of arXiv 2305.01644 as patches of cross-attention.

`attn2_patch` gets the encodings before the projections: the edited ones go on, one for the keys and one for the values (all layers share
them, as the key lock makes o*_K of the superclass). `attn2_replace` gets the projections: the values, which have an output of their own in
each layer, get g o*_V, and attention is computed, with a mask where a concept has a region. Weights stay as they are, so LoRAs go on
working. Rows are known by the encoding of the concept's word; rows without one keep their bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from perfusion.edit import EditedText, RowSettings, Tables, edit_encodings
from perfusion.original_names import original_name
from perfusion_kernels import ConceptBank

from .concepts import Use, joined

SAME = 0.999  # cosine of a token and a concept's word as it was encoded; half precision leaves more
LAYERS_PER_BLOCK = 2  # of every Stable Diffusion UNet
_EDITS, _MASK = "perfusion_edits", "perfusion_mask"  # in the options that both patches of a block get, and no other block


def patch(model: Any, uses: Sequence[Use]) -> Any:
    """A copy of a ComfyUI model that draws the concepts of conditionings. ValueError where they are for another model."""
    concepts = joined([use.loaded for use in uses])
    if not concepts:
        raise ValueError("the conditioning names no concept: write <name> in the prompt of a Perfusion Text Encode node.")
    base = concepts[0].concept.base
    blocks = {name: _block(original_name(name, LAYERS_PER_BLOCK)) for name in base.layers}
    _check(model, blocks, base)
    edit, model = Edit(uses), model.clone()
    model.set_model_attn2_patch(edit.patch)
    replaced = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for name, (place, number, index) in blocks.items():
        columns = base.slices[name]
        earlier = replaced.get((place, number, index), replaced.get((place, number)))
        model.set_model_attn2_replace(edit.replacement(columns, earlier), place, number, index)
    return model


def _block(name: str) -> tuple[str, int, int]:
    """("input", 4, 0) of "input_blocks.4.1.transformer_blocks.0.attn2", which is how ComfyUI numbers them."""
    place, number, index = re.fullmatch(r"(input|output|middle)_blocks?\.(\d+)(?:\.1)?\.transformer_blocks\.(\d+)\.attn2", name).groups()
    return place, 0 if place == "middle" else int(number), int(index)


def _check(model: Any, blocks: dict[str, tuple[str, int, int]], base: Any) -> None:
    unet = model.model.diffusion_model
    for name, (place, number, index) in blocks.items():
        try:
            block = unet.middle_block if place == "middle" else getattr(unet, f"{place}_blocks")[number]
            layer = block[1].transformer_blocks[index].attn2.to_v
            found = (layer.weight.shape[1], layer.weight.shape[0])
        except (AttributeError, IndexError, KeyError):
            found = None
        if found != (base.encoding_dim, base.layers[name]):
            where = f"its layer {place} {number}.{index} does not fit."
            raise ValueError(f"the concept is made for {base}, and this model is another one: {where}")


class Edit:
    """The edit of whatever batch ComfyUI runs. Patches are bound methods and closures, which ComfyUI shares between copies of a model."""

    def __init__(self, uses: Sequence[Use]):
        self.uses = list(uses)
        concepts = {use.loaded.name: use.loaded.concept for use in self.uses}
        base = next(iter(concepts.values())).base
        self.bank = ConceptBank(len(concepts), base.encoding_dim, base.outputs)
        for name, concept in concepts.items():
            self.bank.add(name, target=concept.target, metric_target=concept.metric_target, superclass=concept.superclass_encoding,
                          value_output=concept.value_outputs)  # fmt: skip
        self.key_outputs = None
        if any(concept.key_outputs is not None for concept in concepts.values()):
            self.key_outputs = torch.zeros_like(self.bank.value_outputs)
            for name, concept in concepts.items():
                if concept.key_outputs is not None:
                    self.key_outputs[self.bank.slot(name)] = concept.key_outputs
        self.unlocked = torch.tensor([concept.key_outputs is not None for concept in concepts.values()])
        self.words = normalize(torch.cat([use.encodings for use in self.uses]).float(), dim=-1)
        self.owner = torch.tensor([number for number, use in enumerate(self.uses) for _ in use.encodings])
        self._last: tuple[Tensor, Tensor, int, Batch | None] | None = None  # all blocks of a forward read the same tensor

    def __deepcopy__(self, memo: Any) -> Edit:
        return self  # ComfyUI copies a model's options whenever a node changes it; nothing in here changes

    def patch(self, hidden: Tensor, keys: Tensor, values: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
        last = self._last
        if last is None or last[0] is not keys or last[1] is not values or last[2] != keys._version:
            self._last = last = keys, values, keys._version, self._edit(keys, values)
        batch = last[3]
        options.setdefault(_EDITS, {})[self] = batch
        return (hidden, keys, values) if batch is None else (hidden, batch.keys, batch.values)

    def replacement(self, columns: slice, earlier: Callable | None) -> Callable:
        """For one layer, whose outputs are these columns. earlier: what another node, or an Apply before this one, has put there."""

        def replace(query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
            batch = options.get(_EDITS, {}).get(self)
            if batch is not None:
                value = batch.add(value, batch.edited.gates, batch.tables.value_outputs[:, columns])
                if batch.edited.key_gates is not None:
                    key = batch.add(key, batch.edited.key_gates, batch.tables.key_outputs[:, columns])
                mask = batch.mask(query, options.get("original_shape"))
                if mask is not None:
                    options[_MASK] = mask if options.get(_MASK) is None else torch.minimum(mask, options[_MASK])
            mask = options.get(_MASK)
            if earlier is not None and (mask is None or hasattr(earlier, "perfusion")):
                return earlier(query, key, value, options)
            from comfy.ldm.modules.attention import optimized_attention

            return optimized_attention(query, key, value, options["n_heads"], mask=mask, attn_precision=options.get("attn_precision"))

        replace.perfusion = True
        return replace

    def _edit(self, encodings: Tensor, values: Tensor) -> Batch | None:
        if encodings.shape[-1] != self.words.shape[1]:
            return None
        near = normalize(encodings.float(), dim=-1) @ self.words.T.to(encodings.device) > SAME  # [R, T, n]
        near = near.cpu()
        rows: dict[int, dict[str, int]] = {}  # row -> name -> number of the use
        for row, word in near.any(1).nonzero().tolist():
            use = int(self.owner[word])
            rows.setdefault(row, {}).setdefault(self.uses[use].loaded.name, use)
        if not rows:
            return None
        return Batch(self, encodings, values, rows, near)


class Batch:
    """The edit of one batch. encodings, values [R, T, D]: what keys and values are made of, as a rule the same tensor.

    keys, values: what the projections are to read instead; rows without a concept are copies.
    """

    def __init__(self, edit: Edit, encodings: Tensor, values: Tensor, rows: dict[int, dict[str, int]], near: Tensor):
        device = encodings.device
        self.edit, self.rows, self.uses = edit, torch.tensor(list(rows), device=device), [list(found.values()) for found in rows.values()]
        index = edit.bank.index([list(found) for found in rows.values()])
        width = index.shape[1]

        def table(setting: str, default: Callable[[Any], float]) -> Tensor:
            values = [[default(edit.uses[use].loaded) for use in found] + [1.0] * (width - len(found)) for found in self.uses]
            return torch.tensor(values, dtype=torch.float32, device=device)

        settings = RowSettings(
            index.to(device),
            table("bias", lambda one: one.concept.bias if one.bias is None else one.bias),
            table("temperature", lambda one: one.concept.temperature if one.temperature is None else one.temperature),
            table("strength", lambda one: one.strength),
        )
        bank = edit.bank
        self.tables = Tables(*(each.to(device) for each in (bank.targets, bank.metric_targets, bank.superclasses, bank.value_outputs)))
        if edit.key_outputs is not None:
            self.tables.key_outputs, self.tables.unlocked = edit.key_outputs.to(device), edit.unlocked.to(device)
        self.index = settings.index.clamp(min=0).long()
        self.edited: EditedText = edit_encodings(encodings[self.rows], self.tables, settings)
        self.keys, self.values = encodings.clone(), values.clone()
        self.keys[self.rows] = self.edited.keys.to(encodings.dtype)
        other = 0 if values is encodings else values[self.rows] - encodings[self.rows]  # what another patch made of the values
        self.values[self.rows] = (self.edited.values + other).to(encodings.dtype)
        self.near, self.shape = near, encodings.shape[:2]
        self._masks: dict[tuple, Tensor | None] = {}

    def add(self, projected: Tensor, gates: Tensor, outputs: Tensor) -> Tensor:
        """projected [R, T, d] + Σ_j gates[r, t, j] outputs[index[r, j]], in the rows that have concepts."""
        added = torch.einsum("rtj,rjd->rtd", gates, outputs[self.index].to(gates.dtype))
        return projected.index_add(0, self.rows, added.to(projected.dtype))

    def mask(self, query: Tensor, latent: Sequence[int] | None) -> Tensor | None:
        """[R, N, T] to be added to attention scores, or None where no concept has a region: its word is out of reach outside of it."""
        regions = [(row, use) for row, found in zip(self.rows.tolist(), self.uses) for use in found if self._region(use) is not None]
        if not regions or latent is None:
            return None
        key = query.shape[1], query.dtype
        if key not in self._masks:
            size = _size_of(query.shape[1], latent[-2], latent[-1])
            mask = torch.zeros(self.shape[0], query.shape[1], self.shape[1])
            for row, use in regions if size is not None else ():
                inside = interpolate(self._region(use)[None, None].float().cpu(), size, mode="area").flatten() > 0.5
                words = self.near[row][:, self.edit.owner == use].any(1)
                mask[row][torch.outer(~inside, words)] = torch.finfo(query.dtype).min
            self._masks[key] = mask.to(query.device, query.dtype) if size is not None else None
        return self._masks[key]

    def _region(self, use: int) -> Tensor | None:
        return self.edit.uses[use].loaded.region


def _size_of(count: int, height: int, width: int) -> tuple[int, int] | None:
    """Height and width of the level of a UNet that has so many image tokens; levels halve, rounding up."""
    while height * width > count:
        height, width = (height + 1) // 2, (width + 1) // 2
    return (height, width) if height * width == count else None
