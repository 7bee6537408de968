"""K and V of all cross-attention layers for one row, from its encodings and concepts, in numpy.

With the encodings e [T, D] of a prompt, the concepts i*_j, m_j = C⁻¹ i*_j, s_j and o*_V,j, and W_K, W_V of all layers above one
another (DESIGN.md, (1) to (5), H1 and H2)

    c_j(e) = e·m_j / i*_j·m_j       g_j = sigmoid((c_j - bias_j) / temperature_j)       R a = c,  R_jk = c_j(i*_k)
    K = e W_Kᵀ + Σ_j (g_j W_K s_j - a_j W_K i*_j)       V = e W_Vᵀ + Σ_j (g_j o*_V,j - a_j W_V i*_j)

Products with W are made once per row; gates may change at every step and cost [T, 2J] x [2J, O].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from perfusion.runtime.concept import Concept

__all__ = ["EditedRow", "Use", "concept_gates", "dependent_concepts"]

MAX_CONDITION = 1e3  # of the normalised Gram matrix, as everywhere in perfusion
BLOCK = 8192  # outputs whose weights are widened at once

Setting = float | Sequence[float] | Callable[[int], float]


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A concept as one row uses it.

    strength, bias, temperature: numbers, or schedules: one number per step, or a function of the step. places: the text positions
    of its own words.
    """

    concept: Concept
    places: tuple[int, ...]
    strength: Setting = 1.0
    bias: Setting = 0.0
    temperature: Setting = 1.0


def concept_gates(
    encodings: np.ndarray,
    targets: np.ndarray,
    metric_targets: np.ndarray,
    bias: np.ndarray,
    temperature: np.ndarray,
    places: Sequence[Sequence[int]] | None = None,
    floor: Sequence[float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Gates g and components a [T, J] of encodings [T, D], in float64; the operator `perfusion_kernels.concept_gates` for one row.

    targets, metric_targets [J, D]; bias, temperature [J]. places: of each concept the text positions of its own words: there its
    gate is at least its floor, and at another concept's it is 0. Components are the exact solution of the Gram system.
    """
    encodings, targets, metric_targets = (np.asarray(each, np.float64) for each in (encodings, targets, metric_targets))
    energies = (targets * metric_targets).sum(-1)
    similarities = encodings @ metric_targets.T / energies
    system = metric_targets @ targets.T / energies[:, None]
    components = np.linalg.solve(system, similarities.T).T
    with np.errstate(over="ignore"):  # exp of a large number: the gate is 0
        gates = 1 / (1 + np.exp(-(similarities - bias) / temperature))
    if places is not None:
        own = np.zeros(gates.shape, bool)
        for concept, positions in enumerate(places):
            own[list(positions), concept] = True
        least = np.zeros(len(targets)) if floor is None else np.asarray(floor)
        gates = np.where(own, np.maximum(gates, least), np.where(own.any(1, keepdims=True), 0, gates))
    return gates, components


def dependent_concepts(targets: np.ndarray, metric_targets: np.ndarray) -> list[int]:
    """Which rows of targets [J, D] make the Gram matrix nearly singular; none if it is not."""
    ratios = np.asarray(metric_targets, np.float64) @ np.asarray(targets, np.float64).T
    ratios = ratios / np.diag(ratios)[:, None]
    cosines = np.sign(ratios) * np.sqrt((ratios * ratios.T).clip(min=0))
    values, vectors = np.linalg.eigh((cosines + cosines.T) / 2)
    if values[0] * MAX_CONDITION >= values[-1]:
        return []
    share = np.abs(vectors[:, 0])
    return np.flatnonzero(share > 0.1 * share.max()).tolist()


def project(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """rows [n, D] times weight [O, D] transposed: [n, O] in float32."""
    output = np.empty((len(rows), len(weight)), np.float32)
    for start in range(0, len(weight), BLOCK):
        block = slice(start, start + BLOCK)
        np.matmul(rows, weight[block].astype(np.float32, copy=False).T, out=output[:, block])
    return output


def at(setting: Any, step: int) -> float:
    """A setting's value at a step; the last number of a schedule goes on."""
    if callable(setting):
        return float(setting(step))
    return float(setting) if np.ndim(setting) == 0 else float(setting[min(step, len(setting) - 1)])


class EditedRow:
    """One row's K and V.

    encodings [T, D]; weights [O, D]; uses: its concepts. key_encodings [T, D]: give all keys, under the global lock. floor: the
    least gate at a concept's own words, for gates by word; None for gates by similarity alone, which do not look at places.
    """

    def __init__(
        self,
        encodings: np.ndarray,
        key_weight: np.ndarray,
        value_weight: np.ndarray,
        uses: Sequence[Use] = (),
        key_encodings: np.ndarray | None = None,
        floor: float | None = None,
    ):
        self.encodings, self.uses, self.floor = np.asarray(encodings, np.float32), tuple(uses), floor
        self.locked_to_text = key_encodings is not None
        concepts = [use.concept for use in uses]
        self.targets = np.stack([each.target for each in concepts]) if concepts else np.zeros((0, self.encodings.shape[1]), np.float32)
        self.metric_targets = np.stack([each.metric_target for each in concepts]) if concepts else self.targets
        locks = np.stack([each.superclass_encoding for each in concepts]) if concepts else self.targets
        tokens, count = len(self.encodings), len(concepts)
        source = self.encodings if key_encodings is None else np.asarray(key_encodings, np.float32)
        keys = project(np.concatenate([source, locks, self.targets]), key_weight)
        values = project(np.concatenate([self.encodings, self.targets]), value_weight)
        self.base_key, key_outputs, self.key_targets = np.split(keys, [tokens, tokens + count])
        self.base_value, self.value_targets = np.split(values, [tokens])
        self.key_outputs = key_outputs.copy()
        for place, concept in enumerate(concepts):
            if concept.key_outputs is not None:
                self.key_outputs[place] = concept.key_outputs
        self.value_outputs = np.stack([each.value_outputs for each in concepts]) if concepts else self.value_targets

    @property
    def changes(self) -> bool:
        """Whether K and V differ from step to step."""
        return any(callable(each) or np.ndim(each) for use in self.uses for each in (use.strength, use.bias, use.temperature))

    def at(self, step: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """K and V [T, O] of a step, float32."""
        if not self.uses:
            return self.base_key, self.base_value
        settings = {name: np.array([at(getattr(use, name), step) for use in self.uses]) for name in ("strength", "bias", "temperature")}
        words = {} if self.floor is None else {"places": [use.places for use in self.uses], "floor": [self.floor] * len(self.uses)}
        gates, components = concept_gates(
            self.encodings, self.targets, self.metric_targets, settings["bias"], settings["temperature"], **words
        )
        gates, components = (each.astype(np.float32) for each in (gates * settings["strength"], components * settings["strength"]))
        key = self.base_key if self.locked_to_text else self.base_key + gates @ self.key_outputs - components @ self.key_targets
        return key, self.base_value + gates @ self.value_outputs - components @ self.value_targets
