"""Gates and components, one launch for all prompts of a batch.

A program has a block of tokens of one batch row. It sums m_j · e and m_j · i*_k over D in float32 without tensor cores,
because TF32 is too coarse for the cancellation in C⁻¹; then it solves R a = c by the reference's elimination, with R in
registers. Each program recomputes R: J more rows beside its tokens, instead of another launch and a dependency. Beyond 8
places R does not fit in registers; a kernel then computes only the sums, and plain torch the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_errors import words
from ..reference import concept_gates as reference
from .device import slots_at
from .device import unsupported as unsupported
from .tuning import launch

IN_REGISTERS = 8  # places

STAGES = 4
"""Steps over D whose loads are in flight, plus one: the sums of a step take far less time than its loads."""

SMALL = ["index", "bias", "temperature"]
"""Not specialised on 16-byte alignment, so that slices of a batch do not recompile."""

TILES = (
    {"BLOCK_T": 8, "BLOCK_D": 32, "num_warps": 4},
    {"BLOCK_T": 8, "BLOCK_D": 16, "num_warps": 4},
    {"BLOCK_T": 4, "BLOCK_D": 64, "num_warps": 4},
    {"BLOCK_T": 16, "BLOCK_D": 32, "num_warps": 4},
    {"BLOCK_T": 4, "BLOCK_D": 32, "num_warps": 4},
)
"""Few tokens per program: a prompt has 77, and a GPU needs about a hundred programs. BLOCK_T · 8 · BLOCK_D sums are in registers."""


def tiles(J: int) -> tuple[dict[str, int], ...]:
    """The list for J up to 8. Beyond 4, the first one's 8 x 32 tile would spill on compute capability 8.6."""
    return TILES if J <= 4 else TILES[1:]


def concept_gates(
    encodings: Tensor,
    targets: Tensor,
    metric_targets: Tensor,
    index: Tensor,
    bias: Tensor,
    temperature: Tensor,
    places: Tensor | None,
    floor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (B, T, D), J = encodings.shape, index.shape[1]
    if J > IN_REGISTERS:
        return _beyond_registers(encodings, targets, metric_targets, index, bias, temperature, places, floor)
    gates, components = (encodings.new_empty((B, T, J), dtype=torch.float32) for _ in range(2))
    if gates.numel():
        tensors = (encodings, targets, metric_targets, index, bias, temperature)
        strides = [n for x in tensors for n in x.stride()]
        strides += [n for x, size in ((places, 3), (floor, 2)) for n in ((0,) * size if x is None else x.stride())]
        P = 0 if places is None else places.shape[2]
        arguments = (*tensors, places, floor, words(encodings.device), T, D, len(targets), P, *strides)
        PLACES = triton.next_power_of_2(J)

        def run(shape):
            grid = (triton.cdiv(T, shape["BLOCK_T"]), B)
            _concept_gates[grid](gates, components, *arguments, J=J, PLACES=PLACES, STAGES=STAGES, **shape)

        launch("concept_gates", (T, D, J, encodings.dtype), encodings.device, tiles(J), run)
    return gates, components


@triton.jit
def _sum(x):
    """Sums of x[a, b, :] that stay accurate where large terms cancel, as those of C⁻¹ do.

    Every term is split at one common bit, given by a bound of the sum of all magnitudes: the upper parts add up
    exactly, in any order, and the lower parts are small.
    """
    largest = tl.max(tl.abs(x), 2).to(tl.int32, bitcast=True)
    # a bound that exceeds the sum of magnitudes, times 1.5, so that adding x does not change its exponent
    bound = 3.0 * x.shape[2] * (largest & 0x7F800000).to(tl.float32, bitcast=True)[:, :, None]
    upper = (x + bound) - bound
    return tl.sum(upper, 2) + tl.sum(x - upper, 2)


@triton.jit
def divided(x, y):
    """x / y correctly rounded, with y broadcast to x."""
    return tl.div_rn(x, tl.broadcast_to(y, x.shape))


@triton.jit
def similarities(
    encodings, targets, metric_targets, t, slots, T, D, encodings_t, encodings_d, targets_s, targets_d, metric_s, metric_d,
    PLACES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """c [BLOCK_T, PLACES] of tokens t, R [PLACES, PLACES] and ε [PLACES]; an empty place has 0, the identity's row and 1."""
    present = slots >= 0
    j = tl.arange(0, PLACES)
    # BLOCK_D partial sums each, reduced once at the end: fewer shuffles
    c_parts = tl.zeros((BLOCK_T, PLACES, BLOCK_D), tl.float32)
    system_parts = tl.zeros((PLACES, PLACES, BLOCK_D), tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = start + tl.arange(0, BLOCK_D)
        tokens = t.to(tl.int64)[:, None] * encodings_t + d[None, :] * encodings_d
        e = tl.load(encodings + tokens, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        inside = present[:, None] & (d < D)[None, :]
        m = tl.load(metric_targets + slots[:, None] * metric_s + d[None, :] * metric_d, mask=inside, other=0.0)
        i = tl.load(targets + slots[:, None] * targets_s + d[None, :] * targets_d, mask=inside, other=0.0)
        c_parts += e[:, None, :] * m[None, :, :]
        system_parts += m[:, None, :] * i[None, :, :]
    system = _sum(system_parts)
    one = (j[:, None] == j[None, :]).to(tl.float32)
    energies = tl.where(present, tl.sum(system * one, 1), 1.0)
    system = tl.where(present[:, None], divided(system, energies[:, None]), one)
    return divided(_sum(c_parts), energies[None, :]), system, energies


@triton.jit
def solved(system, right, J: tl.constexpr, PLACES: tl.constexpr):
    """The rows a of R a = c, c being those of `right`, by elimination; rows and columns are extracted from registers by masked sums."""
    j = tl.arange(0, PLACES)
    for pivot in tl.static_range(J):
        here = j == pivot
        row = tl.sum(tl.where(here[:, None], system, 0.0), 0)
        column = tl.sum(tl.where(here[None, :], system, 0.0), 1)
        inverse = tl.div_rn(1.0, tl.sum(tl.where(here, row, 0.0), 0))
        left = tl.where(here, column - 1.0, column)
        system -= left[:, None] * (row * inverse)[None, :]
        right -= left[None, :] * (tl.sum(tl.where(here[None, :], right, 0.0), 1) * inverse)[:, None]
    return right


@triton.jit(do_not_specialize=["S", "P"], do_not_specialize_on_alignment=[*SMALL, "places", "floor"])
def _concept_gates(
    gates, components, encodings, targets, metric_targets, index, bias, temperature, places, floor, errors, T, D, S, P,
    encodings_b, encodings_t, encodings_d, targets_s, targets_d, metric_s, metric_d, index_b, index_j,
    bias_b, bias_j, temperature_b, temperature_j, places_b, places_j, places_p, floor_b, floor_j,
    J: tl.constexpr, PLACES: tl.constexpr, STAGES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """gates, components [B, T, J] of BLOCK_T tokens of row b."""
    b = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.arange(0, PLACES)
    slots = slots_at(index + b * index_b + j * index_j, j < J, S, errors)
    present = slots >= 0
    g = tl.zeros((BLOCK_T, PLACES), tl.float32)
    a = tl.zeros((BLOCK_T, PLACES), tl.float32)
    if tl.max(slots, 0) >= 0:
        c, system, energies = similarities(
            encodings + b * encodings_b, targets, metric_targets, t, slots, T, D,
            encodings_t, encodings_d, targets_s, targets_d, metric_s, metric_d, PLACES, BLOCK_T, BLOCK_D, STAGES,
        )  # fmt: skip
        beta = tl.load(bias + b * bias_b + j * bias_j, mask=present, other=0.0)
        tau = tl.load(temperature + b * temperature_b + j * temperature_j, mask=present, other=1.0)
        g = tl.where(present[None, :], tl.sigmoid(divided(c - beta[None, :], tau[None, :])), 0.0)
        a = tl.where(present[None, :], solved(system, c, J, PLACES), 0.0)
        if places is not None:
            own = tl.zeros((BLOCK_T, PLACES), tl.int32)
            for p in range(P):
                place = tl.load(places + b * places_b + j * places_j + p * places_p, mask=present, other=-1)
                own = own | (t[:, None] == place[None, :]).to(tl.int32)
            if floor is not None:
                least = tl.load(floor + b * floor_b + j * floor_j, mask=present, other=0.0)
                g = tl.where((own > 0) & (g < least[None, :]), least[None, :], g)
            g = tl.where(tl.sum(own, 1)[:, None] > own, tl.where(own > 0, g, 0.0), g)  # words of others are at t
    written = (t < T)[:, None] & (j < J)[None, :]
    at = (b * T + t)[:, None] * J + j[None, :]
    tl.store(gates + at, g, mask=written)
    tl.store(components + at, a, mask=written)


def _beyond_registers(*arguments) -> tuple[Tensor, Tensor]:
    """The same for any J: the sums over D by a kernel, elimination and gates as the reference has them."""
    encodings, targets, metric_targets, index, bias, temperature, places, floor = arguments
    (B, T, D), J = encodings.shape, index.shape[1]
    present = reference.in_range(index, len(targets))
    products = encodings.new_empty((B, J, T + J), dtype=torch.float32)
    if products.numel():
        tables = (encodings, targets, metric_targets, index)
        strides = [n for x in tables for n in x.stride()]

        def run(tiles):
            grid = (triton.cdiv(T + J, tiles["BLOCK_T"]), triton.cdiv(J, IN_REGISTERS), B)
            arguments = (products, *tables, words(encodings.device), T, D, J, len(targets), *strides)
            _products[grid](*arguments, PLACES=IN_REGISTERS, STAGES=STAGES, **tiles)

        launch("concept_gates_products", (T, D, J, encodings.dtype), encodings.device, TILES, run)
    energies = torch.where(present, products[..., T:].diagonal(dim1=1, dim2=2), 1)
    similarities, system = (products / energies[..., None]).split((T, J), -1)
    system = system + torch.diag_embed((~present).float())
    projection = reference._Projection(present, None, None, energies, similarities, system)
    gates = torch.where(present[..., None], torch.sigmoid(reference._logits(projection, bias, temperature)), 0)
    gates = reference.by_word(gates, present, places, floor)
    components = torch.where(present[..., None], reference._solve(system, similarities), 0)
    return gates.mT.contiguous(), components.mT.contiguous()


@triton.jit(do_not_specialize=["S"], do_not_specialize_on_alignment=["index"])
def _products(
    products, encodings, targets, metric_targets, index, errors, T, D, J, S,
    encodings_b, encodings_t, encodings_d, targets_s, targets_d, metric_s, metric_d, index_b, index_j,
    PLACES: tl.constexpr, STAGES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """products[b, j, x] = m_j · e_x for the T tokens, then m_j · i*_k for the J places; 0 for an empty one."""
    b = tl.program_id(2).to(tl.int64)
    j = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    x = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = slots_at(index + b * index_b + j * index_j, j < J, S, errors)
    others = slots_at(index + b * index_b + (x - T) * index_j, (x >= T) & (x < T + J), S, errors)
    parts = tl.zeros((PLACES, BLOCK_T, BLOCK_D), tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = start + tl.arange(0, BLOCK_D)
        inside = (d < D)[None, :]
        m = tl.load(
            metric_targets + slots[:, None] * metric_s + d[None, :] * metric_d, mask=(slots >= 0)[:, None] & inside, other=0.0
        )
        tokens = b * encodings_b + x.to(tl.int64)[:, None] * encodings_t + d[None, :] * encodings_d
        e = tl.load(encodings + tokens, mask=(x < T)[:, None] & inside, other=0.0).to(tl.float32)
        i = tl.load(
            targets + others[:, None] * targets_s + d[None, :] * targets_d, mask=(others >= 0)[:, None] & inside, other=0.0
        )
        parts += m[:, None, :] * (e + i)[None, :, :]
    written = (j < J)[:, None] & (x < T + J)[None, :]
    tl.store(products + (b * J + j)[:, None] * (T + J) + x[None, :], _sum(parts), mask=written)
