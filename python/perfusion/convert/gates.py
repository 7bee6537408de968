"""Where the gate opens in ordinary prompts, and what it makes of one output per token position.

One output per position becomes one: the gate decides what an output is worth, so o* is the mean of the rows weighted by
the squared gate at each position of ordinary prompts, which is the least-squares choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from perfusion.base import text_encoders
from perfusion.convert.checkpoint import ConversionError
from perfusion.convert.layouts import Found
from perfusion.text import superclass_tokens

__all__ = ["Reader", "collapse", "training_gates"]

TRAINING_BIAS, TRAINING_TEMPERATURE = 0.75, 0.1
LEAST_SIMILARITY = 0.5  # at the concept word, where 1 is expected


class Reader:
    """Encodes prompts in which one token has a given embedding: the last one of a word."""

    def __init__(self, pipe: Any) -> None:
        self.tokenizer, self.encoder = text_encoders(pipe)[0]

    @torch.no_grad()
    def encode(self, templates: Sequence[str], word: str, embedding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encodings [P, T, D] in float64 of the templates with `word` in them, and where its last token stands [P, T]."""
        texts = [template.format(word) for template in templates]
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        word_ids = superclass_tokens(self.tokenizer, word)
        windows = ids.unfold(1, len(word_ids), 1) == torch.tensor(word_ids)
        place = functional.pad(windows.all(-1), (len(word_ids) - 1, 0))
        if not (place.sum(1) == 1).all():
            raise ConversionError(f"each template must hold {{}} once and nothing like {word!r} besides, got {list(templates)}.")

        def substitute(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            where = place.to(output.device)[..., None]
            return torch.where(where, embedding.to(output), output)

        table = self.encoder.get_input_embeddings()
        handle = table.register_forward_hook(substitute) if embedding is not None else None
        try:
            encodings = self.encoder(ids.to(table.weight.device))[0]
        finally:
            if handle is not None:
                handle.remove()
        return encodings.cpu().double(), place

    def superclass_encoding(self, superclass: str, templates: Sequence[str]) -> Tensor:
        """s [D]: the mean encoding at the superclass word."""
        encodings, place = self.encode(templates, superclass)
        return encodings[place].mean(0)


def training_gates(reader: Reader, found: Found, metric_target: Tensor, templates: Sequence[str]) -> tuple[Tensor, float]:
    """The training gate at every position of every template with the concept word in it, [P, T]; and the mean c at the word."""
    encodings, place = reader.encode(templates, "*", found.word)
    similarity = encodings @ metric_target / torch.dot(found.target, metric_target)
    at_word = similarity[place].mean().item()
    if at_word < LEAST_SIMILARITY:
        raise ConversionError(
            f"at the concept word the similarity to i* is {at_word:.2f}, and 1 is expected: the gate would not open. "
            "The checkpoint was trained with another text encoder, or another of its layers."
        )
    return torch.sigmoid((similarity - TRAINING_BIAS) / TRAINING_TEMPERATURE), at_word


def collapse(rows: Mapping[str, Tensor], gates: Tensor, notes: list[str], kind: str) -> Tensor:
    """One output for all positions: [O] from [R, d] per layer, in layer order."""
    outputs = torch.cat(list(rows.values()), dim=1)  # [R, O]
    if len(outputs) == 1:
        return outputs[0]
    weights = (gates**2).sum(0)  # [R]
    weights = weights / weights.sum()
    mean = weights @ outputs
    spread = ((weights @ (outputs - mean).square().sum(1)).sqrt() / mean.norm()).item()
    top = weights.argsort(descending=True)[:4].tolist()
    shares = ", ".join(f"token {position} {weights[position]:.0%}" for position in top if weights[position] > 0.01)
    notes.append(
        f"Approximated: the port has one o* per token position; the {kind} are their mean, weighted by the squared gate "
        f"({shares}). The positions differ from it by {spread:.0%} (root mean square)."
    )
    return mean
