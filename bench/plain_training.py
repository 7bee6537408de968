"""The peers of the training step: Perfusion's layer as the paper writes it, and as an expert would in plain torch.

Both draw the same pictures, noise and captions as ours, learn the same vectors with the same optimiser, and differ in what
replaces the layers' projections and in how often text is encoded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from perfusion.base import cross_attention_layers, layer_width
from perfusion.training.session import TrainingSession


class PlainSession(TrainingSession):
    """Every `to_k` and `to_v` is a module that computes eq. 3 from the encodings of the whole batch, gates and all."""

    def __enter__(self) -> PlainSession:
        super().__enter__()
        self._hooks.remove()
        self._batched = None
        self._inverse = torch.linalg.inv(self.covariance.matrix).to(self.device, torch.promote_types(self.pipe.unet.dtype, torch.float32))
        end = 0
        for layer in cross_attention_layers(self.pipe.unet).values():
            columns = slice(end, end := end + layer_width(layer))
            # o*_K = W_K s is constant; o*_V is trained
            locked = linear(self.superclass_encoding.to(layer.to_k.weight), layer.to_k.weight)
            for kind, module, output in (("to_k", layer.to_k, locked), ("to_v", layer.to_v, None)):
                setattr(layer, kind, self._layer(module, columns, output))
                self._undo.callback(setattr, layer, kind, module)
        return self

    def _layer(self, module: torch.nn.Linear, columns: slice, output: Tensor | None) -> torch.nn.Module:
        return GatedEdit(self, module, columns, output)

    def _distinct(self, captions: list[str]) -> tuple[list[str], Tensor]:
        return captions, torch.arange(len(captions), device=self.device)

    @contextlib.contextmanager
    def _editing(self, encodings: Tensor, rows: Tensor) -> Iterator[Tensor]:
        self.text = encodings[rows]  # with its gradient, which what the denoiser is given lacks
        with torch.no_grad():
            gates = self.gate(self.text)[1][..., None]
        yield gates

    def gate(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities and gates [R, T] of encodings [R, T, D] (eq. 3)."""
        target = self.target.to(self._inverse.dtype)
        metric = self._inverse @ target
        similarity = (e.to(metric.dtype) @ metric) / (target @ metric)
        return similarity, torch.sigmoid((similarity - self.config.bias) / self.config.temperature)


class GatedEdit(torch.nn.Module):
    """h = W (e − c i*) + g o* (arXiv 2305.01644, eq. 3), e being the session's text, whatever is given.

    output: o* [d], or None for the session's own columns, which are trained.
    """

    def __init__(self, session: PlainSession, module: torch.nn.Linear, columns: slice, output: Tensor | None):
        super().__init__()
        self.weight, self.session, self.columns, self.output = module.weight, session, columns, output

    def forward(self, _: Tensor) -> Tensor:
        e = self.session.text
        c, g = self.session.gate(e)
        return self._edited((e - c[..., None] * self.session.target).to(e.dtype), g)

    def _edited(self, e: Tensor, g: Tensor) -> Tensor:
        o = self.session.value_outputs[self.columns] if self.output is None else self.output
        return linear(e, self.weight) + (g[..., None] * o).to(e.dtype)


class ExpertSession(PlainSession):
    """Each caption is encoded once, and similarities, gates and the encodings without the target are computed once for all layers."""

    def _layer(self, *arguments: Any) -> torch.nn.Module:
        return SharedEdit(self, *arguments)

    _distinct = TrainingSession._distinct

    @contextlib.contextmanager
    def _editing(self, encodings: Tensor, rows: Tensor) -> Iterator[Tensor]:
        c, gates = self.gate(encodings)
        self.text = (encodings - c[..., None] * self.target).to(encodings.dtype)[rows]
        self.gates = gates[rows]
        yield self.gates[..., None]


class SharedEdit(GatedEdit):
    def forward(self, _: Tensor) -> Tensor:
        return self._edited(self.session.text, self.session.gates)
