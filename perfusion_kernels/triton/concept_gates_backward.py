"""The derivatives of `concept_gates` with Triton (DESIGN.md, equations 6 to 9): two launches, and a sum over shared slots.

A program of the first kernel has a block of tokens of one batch row and recomputes the forward kernel's sums and solve. It
writes de, and for the second kernel dc / ε of each token and its tokens' partial sums over t. A program of the second has a
block of columns of one batch row and computes di* and dm of its concepts. Rows that share a slot are then added in a fixed
order. There are no atomics, so results are deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_errors import words
from . import device
from .concept_gates import IN_REGISTERS, SMALL, divided, similarities, solved, tiles
from .device import rounded, slots_at
from .rank_one import sum_by_slot
from .tuning import launch

STAGES = 2  # of `similarities`; more of them spill on compute capability 10.0


def unsupported_backward(gates_gradient: Tensor, components_gradient: Tensor, *arguments) -> str | None:
    *_, index, _, _, places, _, needs = arguments
    if places is not None:
        return "gates by word are differentiated in plain torch"
    if index.shape[1] > IN_REGISTERS:
        return f"it holds the system of up to {IN_REGISTERS} concepts in registers; got J = {index.shape[1]}"
    return device.unsupported(gates_gradient, components_gradient, *arguments)


def concept_gates_backward(gates_gradient: Tensor, components_gradient: Tensor, *arguments) -> list[Tensor]:
    """The gradients that are needed, in order."""
    *arguments, _, _, needs = arguments  # no places and no floor
    encodings, targets, metric_targets, index, bias, temperature = arguments
    (B, T, D), J = encodings.shape, index.shape[1]
    if B * T * D * J == 0:
        return [x.new_zeros(x.shape) for x, need in zip(arguments, needs) if need]
    ENCODINGS, TABLES = needs[0], needs[1] or needs[2]
    places = triton.next_power_of_2(J)
    by_encodings = torch.empty(encodings.shape if ENCODINGS else 0, dtype=encodings.dtype, device=encodings.device)
    by_products = torch.empty((B, T, J), dtype=torch.float32, device=encodings.device)
    by_gram = by_gate = None

    def run(shape):
        nonlocal by_gram, by_gate
        blocks = triton.cdiv(T, shape["BLOCK_T"])
        by_gram, by_gate = (by_products.new_empty((blocks, *shape)) for shape in ((B, J, J), (2, B, J)))
        gradients = (gates_gradient, components_gradient)
        strides = (n for x in (*gradients, *arguments) for n in x.stride())
        _by_token[(blocks, B)](
            by_encodings, by_products, by_gram, by_gate, *gradients, *arguments, words(encodings.device), B, T, D, len(targets), *strides,
            J=J, PLACES=places, ENCODINGS=ENCODINGS, STAGES=STAGES, **shape,
        )  # fmt: skip

    launch("concept_gates_by_token", (T, D, J, encodings.dtype, ENCODINGS), encodings.device, tiles(J), run)
    by_targets = by_metric_targets = None
    if TABLES:
        by_tables = by_products.new_empty((B * J, 2, D))

        def run_tables(shape):
            tables = (encodings, targets, metric_targets, index)
            strides = (n for x in tables for n in x.stride())
            _by_concept[(triton.cdiv(D, shape["BLOCK_D"]), B)](
                by_tables, by_products, by_gram, *tables, words(encodings.device), len(by_gram), B, T, D, len(targets), *strides,
                J=J, PLACES=places, **shape,
            )  # fmt: skip

        launch("concept_gates_by_concept", (T, D, J, encodings.dtype), encodings.device, tiles(J), run_tables)
        by_targets, by_metric_targets = sum_by_slot(by_tables, index, targets)
    sums = (by_gate[:, which].sum(0) if needs[4 + which] else None for which in range(2))
    found = (by_encodings, by_targets, by_metric_targets, None, *sums)
    return [x for x, need in zip(found, needs) if need]


@triton.jit(do_not_specialize=["B", "S"], do_not_specialize_on_alignment=[*SMALL, "gates_gradient", "components_gradient"])
def _by_token(
    by_encodings, by_products, by_gram, by_gate, gates_gradient, components_gradient,
    encodings, targets, metric_targets, index, bias, temperature, errors, B, T, D, S,
    dg_b, dg_t, dg_j, da_b, da_t, da_j,
    encodings_b, encodings_t, encodings_d, targets_s, targets_d, metric_s, metric_d, index_b, index_j,
    bias_b, bias_j, temperature_b, temperature_j,
    J: tl.constexpr, PLACES: tl.constexpr, ENCODINGS: tl.constexpr, STAGES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_T tokens of row b: by_encodings = Σ_j m_j dc_j / ε_j, by_products = dc / ε, and their parts of the sums
    by_gram[block, b, j, k] = dR_jk / ε_j, with dε_j on the diagonal, and by_gate[block, 0 and 1, b, j] = dβ_j and dτ_j.

    dε_j is -Σ_t ds_j c_j / ε_j: the terms with y in the two sums of (7) cancel, because R a = c.
    """
    block, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.arange(0, PLACES)
    slots = slots_at(index + b * index_b + j * index_j, j < J, S, errors)
    present = slots >= 0
    dc = tl.zeros((BLOCK_T, PLACES), tl.float32)
    gram = tl.zeros((PLACES, PLACES), tl.float32)
    by_bias = tl.zeros((PLACES,), tl.float32)
    by_temperature = tl.zeros((PLACES,), tl.float32)
    if tl.max(slots, 0) >= 0:
        c, system, energies = similarities(
            encodings + b * encodings_b, targets, metric_targets, t, slots, T, D,
            encodings_t, encodings_d, targets_s, targets_d, metric_s, metric_d, PLACES, BLOCK_T, BLOCK_D, STAGES,
        )  # fmt: skip
        beta = tl.load(bias + b * bias_b + j * bias_j, mask=present, other=0.0)
        tau = tl.load(temperature + b * temperature_b + j * temperature_j, mask=present, other=1.0)
        here = (t < T)[:, None] & present[None, :]
        dg = tl.load(gates_gradient + b * dg_b + t[:, None] * dg_t + j[None, :] * dg_j, mask=here, other=0.0)
        da = tl.load(components_gradient + b * da_b + t[:, None] * da_t + j[None, :] * da_j, mask=here, other=0.0)
        logits = divided(c - beta[None, :], tau[None, :])
        g = tl.sigmoid(logits)
        ds = divided(dg * g * (1.0 - g), tau[None, :])
        by_bias = -tl.sum(ds, 0)
        by_temperature = -tl.sum(ds * logits, 0)
        a = solved(system, c, J, PLACES)
        y = solved(tl.trans(system), da, J, PLACES)
        dc = divided(ds + y, energies[None, :])
        gram = -tl.sum(y[:, :, None] * a[:, None, :], 0)
        gram -= tl.where(j[:, None] == j[None, :], tl.sum(ds * c, 0)[:, None], 0.0)
        gram = divided(gram, energies[:, None])
    if ENCODINGS:
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = present[:, None] & (d < D)[None, :]
            m = tl.load(metric_targets + slots[:, None] * metric_s + d[None, :] * metric_d, mask=inside, other=0.0)
            de = tl.sum(dc[:, :, None] * m[None, :, :], 1)
            written = (t < T)[:, None] & (d < D)[None, :]
            pointers = by_encodings + (b * T + t)[:, None] * D + d[None, :]
            tl.store(pointers, rounded(de, by_encodings.dtype.element_ty), mask=written)
    tl.store(by_products + (b * T + t)[:, None] * J + j[None, :], dc, mask=(t < T)[:, None] & (j < J)[None, :])
    pairs = by_gram + ((block * B + b) * J + j)[:, None] * J + j[None, :]
    tl.store(pairs, gram, mask=(j < J)[:, None] & (j < J)[None, :])
    tl.store(by_gate + (2 * block * B + b) * J + j, by_bias, mask=j < J)
    tl.store(by_gate + ((2 * block + 1) * B + b) * J + j, by_temperature, mask=j < J)


@triton.jit(do_not_specialize=["blocks", "B", "S"], do_not_specialize_on_alignment=SMALL)
def _by_concept(
    by_tables, by_products, by_gram, encodings, targets, metric_targets, index, errors, blocks, B, T, D, S,
    encodings_b, encodings_t, encodings_d, targets_s, targets_d, metric_s, metric_d, index_b, index_j,
    J: tl.constexpr, PLACES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """by_tables[b J + j, 0 and 1] = di*_j and dm_j from row b, BLOCK_D columns of them; nothing for an empty place."""
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    j = tl.arange(0, PLACES)
    slots = slots_at(index + b * index_b + j * index_j, j < J, S, errors)
    if tl.max(slots, 0) >= 0:
        gram = tl.zeros((PLACES, PLACES), tl.float32)
        pairs = by_gram + (b * J + j)[:, None] * J + j[None, :]
        for _ in range(blocks):
            gram += tl.load(pairs, mask=(j < J)[:, None] & (j < J)[None, :], other=0.0)
            pairs += B * J * J
        inside = (slots >= 0)[:, None] & (d < D)[None, :]
        m = tl.load(metric_targets + slots[:, None] * metric_s + d[None, :] * metric_d, mask=inside, other=0.0)
        i = tl.load(targets + slots[:, None] * targets_s + d[None, :] * targets_d, mask=inside, other=0.0)
        di = tl.sum(gram[:, :, None] * m[:, None, :], 0)
        dm = tl.sum(gram[:, :, None] * i[None, :, :], 1)
        for start in range(0, T, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            tokens = b * encodings_b + t.to(tl.int64)[:, None] * encodings_t + d[None, :] * encodings_d
            e = tl.load(encodings + tokens, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            held = by_products + (b * T + t)[:, None] * J + j[None, :]
            dc = tl.load(held, mask=(t < T)[:, None] & (j < J)[None, :], other=0.0)
            dm += tl.sum(dc[:, :, None] * e[:, None, :], 0)
        rows = by_tables + 2 * (b * J + j)[:, None] * D + d[None, :]
        tl.store(rows, di, mask=inside)
        tl.store(rows + D, dm, mask=inside)
