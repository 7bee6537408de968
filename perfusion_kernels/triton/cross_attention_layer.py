"""A whole cross-attention layer with Triton, in two launches; bias and residual are added as the second stores.

Heads are summed over in the output projection, so in a single launch a program would own whole rows of the result. From
C = 640 on, [rows, C] in float32 leaves registers for so few rows that each reading of the weights serves next to none;
and programs that own some of the columns would each compute queries and attention anew, which is half of the work.
Two launches keep queries, scores and weights on the chip. Between them stands [B, N, H*d], as much as the result.
In float32 the query's projection is the library's, and `edited_attention` follows it.

Absorbed, there is no projection but a softmax between two products: the first launch writes [B, N, H, T], padded to
the tiles, and the second multiplies it by [H*T, C], each batch row by its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from . import device, shared_memory
from . import edited_attention as attention
from .attention_tiles import (
    LOG2_E,
    LONGEST,
    add_product,
    alignment,
    along,
    at_head,
    load_tile,
    padded,
    precision,
    refuses_sizes,
    scores,
    sizes,
    store_tile,
)
from .device import rounded
from .edited_attention import edited_attention
from .edited_attention_backward import attention_gradients, refuses_gradients
from .tuning import Configuration, launch

ENOUGH = 128
"""Programs in a launch, about one per multiprocessor of a large GPU: with fewer, smaller tiles come first."""


def refuses(hidden_states: Tensor, query_weight: Tensor | None, key: Tensor, *rest) -> str | None:
    reason = device.refuses(hidden_states, query_weight, key, *rest)
    if reason is None and query_weight is None and key.shape[1] > LONGEST:
        return f"it holds the scores of a head, up to {LONGEST} positions; got T = {key.shape[1]}"
    return reason or (None if query_weight is None else _refuses_attention(hidden_states, key))


def _refuses_attention(hidden_states: Tensor, key: Tensor) -> str | None:
    T, H, d = key.shape[1:]
    if hidden_states.dtype == torch.float32:
        return attention.refuses(key, key)
    tiles = tall_tiles(hidden_states.shape[1], key.shape[0] * H, key.dtype, d)
    return refuses_sizes(T, d) or shared_memory.refuses(tiles, held(T, d, key.dtype), key.device)


def cross_attention_layer(
    hidden_states: Tensor,
    query_weight: Tensor | None,
    key: Tensor,
    value: Tensor,
    output_weight: Tensor | None,
    output_bias: Tensor | None,
    residual: Tensor | None,
    scale: float,
) -> Tensor:
    B, N, C = hidden_states.shape
    T = key.shape[1]
    result = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
    if result.numel() == 0:
        return result
    if output_weight is None:
        weights = _weigh(hidden_states, key, scale)
        to_h_k_c = value.stride(0), value.stride(2), value.stride(1), value.stride(3)
        _project(weights.view(B, N, -1), value, to_h_k_c, weights.shape[3], T, output_bias, residual, result)
    else:
        attended = _attend(hidden_states, query_weight, key, value, scale)
        strides = (0, 0, output_weight.stride(1), output_weight.stride(0))
        # one weight for all batch rows: their image tokens fill tiles together
        _project(attended.view(1, B * N, -1), output_weight, strides, 0, 0, output_bias, residual, result)
    return result


def _attend(hidden_states: Tensor, query_weight: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale · (x W_Qᵀ) Kᵀ) V [B, N, H, d]."""
    (B, N, C), (T, H, d) = hidden_states.shape, key.shape[1:]
    if hidden_states.dtype == torch.float32:
        # without tensor cores the factors of products stand in registers, which do not hold both kinds of product
        query = functional.linear(hidden_states, query_weight).unflatten(-1, (H, d))
        return edited_attention(query, key, value, *(None,) * 10, scale)
    result = hidden_states.new_empty((B, N, H, d))

    def run(tiles):
        _attend_kernel[(triton.cdiv(N, tiles["BLOCK_N"]) * H, B)](
            hidden_states, query_weight, key, value, result,
            *hidden_states.stride(), *query_weight.stride(), *key.stride(), *value.stride(),
            float(scale), N, C, T, H,
            d=d, ALIGNED=alignment(key.stride(2), value.stride(2)), **sizes(T, d), PRECISION=precision(hidden_states), **tiles,
        )  # fmt: skip

    tiles = shared_memory.fitting(tall_tiles(N, B * H, result.dtype, d), held(T, d, result.dtype), result.device)
    launch("cross_attention_layer attend", (B, N, C, T, H, d, result.dtype), result.device, tiles, run)
    return result


def _weigh(hidden_states: Tensor, key: Tensor, scale: float) -> Tensor:
    """softmax(scale · x K'ᵀ) [B, N, H, T + padding], 0 in the padding."""
    (B, N, C), (T, H) = hidden_states.shape, key.shape[1:3]
    T0, T1 = (sizes(T, 1)[name] for name in ("T0", "T1"))
    result = hidden_states.new_empty((B, N, H, T0 + T1))

    def run(tiles):
        _weigh_kernel[(triton.cdiv(N, tiles["BLOCK_N"]) * H, B)](
            hidden_states, key, result, *hidden_states.stride(), *key.stride(),
            float(scale), N, C, T, H, T0=T0, T1=T1, PRECISION=precision(hidden_states), **tiles,
        )  # fmt: skip

    tiles = tall_tiles(N, B * H, hidden_states.dtype, T)
    launch("cross_attention_layer weigh", (B, N, C, T, H, result.dtype), result.device, tiles, run)
    return result


def _project(
    left: Tensor,
    right: Tensor,
    strides: tuple[int, ...],
    group: int,
    T: int,
    bias: Tensor | None,
    residual: Tensor | None,
    result: Tensor,
) -> None:
    """result = residual + bias + left [rows of right, N, K] · right; `strides` lead along right's rows, heads, k, C."""
    N, C = result.shape[1:]
    count, rows, K = left.shape
    bias_strides = (0,) if bias is None else bias.stride()
    residual_strides = (0, 0, 0) if residual is None else residual.stride()

    def run(tiles):
        grid = (triton.cdiv(rows, tiles["BLOCK_N"]) * triton.cdiv(C, tiles["BLOCK_C"]), count)
        _project_kernel[grid](
            left, right, bias, residual, result, *strides, *bias_strides, *residual_strides,
            rows, N, K, C, T, GROUP=group, PRECISION=precision(left), **tiles,
        )  # fmt: skip

    key = (count, rows, K, C, group, left.dtype)
    launch("cross_attention_layer project", key, left.device, flat_tiles(rows, count, C, left.dtype), run)


def tall_tiles(N: int, pairs: int, dtype: torch.dtype, width: int) -> list[Configuration]:
    """For products of a tile of x with all of a head: as many rows as registers hold beside [BLOCK_N, width]."""
    if dtype == torch.float32:
        found = [{"BLOCK_N": 16, "BLOCK_C": 16, "num_warps": 8 if width > 64 else 4, "num_stages": 1}]
    elif width > 128:
        found = [{"BLOCK_N": n, "BLOCK_C": 32, "num_warps": w, "num_stages": 3} for n, w in ((64, 8), (32, 4), (16, 4))]
    else:
        found = [{"BLOCK_N": n, "BLOCK_C": 64, "num_warps": w, "num_stages": 3} for n, w in ((64, 8), (64, 4), (32, 4), (16, 4))]
    return _filling(found, lambda tiles: triton.cdiv(N, tiles["BLOCK_N"]) * pairs)


def held(T: int, d: int, dtype: torch.dtype) -> shared_memory.Held:
    """Stages of the projection, and after them all keys or values of a head beside a tile of queries or of weights."""
    T, d = padded(T, d)

    def bytes_of(tiles):
        stages = tiles["num_stages"] * tiles["BLOCK_C"] * (tiles["BLOCK_N"] + d)
        return dtype.itemsize * max(stages, 2 * T * d + tiles["BLOCK_N"] * (T + d))

    return bytes_of


def flat_tiles(rows: int, count: int, C: int, dtype: torch.dtype) -> list[Configuration]:
    """For the output's tiles, of which there are `count` times as many as `rows` and C make."""
    if dtype == torch.float32:
        found = [{"BLOCK_N": n, "BLOCK_K": 16, "BLOCK_C": 64, "num_warps": 4, "num_stages": 2} for n in (64, 32, 16)]
    else:
        shapes = ((128, 128, 8), (64, 128, 4), (64, 64, 4), (32, 64, 4), (16, 64, 4))
        found = [{"BLOCK_N": n, "BLOCK_K": 64, "BLOCK_C": c, "num_warps": w, "num_stages": 3} for n, c, w in shapes]
    return _filling(found, lambda tiles: triton.cdiv(rows, tiles["BLOCK_N"]) * triton.cdiv(C, tiles["BLOCK_C"]) * count)


def _filling(configurations: list[Configuration], programs) -> list[Configuration]:
    """The largest tiles that make enough programs first, or the smallest."""
    first = next((tiles for tiles in configurations if programs(tiles) >= ENOUGH), configurations[-1])
    return [first, *(tiles for tiles in configurations if tiles is not first)]


def refuses_backward(gradient: Tensor, hidden_states: Tensor, query_weight: Tensor | None, *rest) -> str | None:
    if query_weight is None:
        return "it differentiates projections, and absorbed ones are there no more"
    key = rest[0]
    reason = device.refuses(gradient, hidden_states, query_weight, *rest) or attention.refuses(key, key)
    return reason or refuses_gradients(key, key.shape[1], key.shape[3])


def cross_attention_layer_backward(
    gradient: Tensor,
    hidden_states: Tensor,
    query_weight: Tensor,
    key: Tensor,
    value: Tensor,
    output_weight: Tensor,
    output_bias: Tensor | None,
    residual: Tensor | None,
    scale: float,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that are needed: the library's products, and the attention's own derivatives between them."""
    heads, no_edit = key.shape[2:], (None,) * 7
    query = functional.linear(hidden_states, query_weight).unflatten(-1, heads)
    found: list[Tensor | None] = [None] * 7
    if any(needs[:4]):
        by_attended = (gradient @ output_weight).unflatten(-1, heads)
        by_query, by_key, by_value = attention_gradients(by_attended, query, key, value, no_edit, scale)
        by_query = by_query.flatten(2)
        found[2:4] = by_key.to(key.dtype), by_value.to(value.dtype)
        if needs[0]:
            found[0] = by_query @ query_weight
        if needs[1]:
            found[1] = by_query.flatten(0, 1).mT @ hidden_states.flatten(0, 1)
    if needs[4]:
        attended = edited_attention(query, key, value, *no_edit, None, None, None, scale)
        found[4] = gradient.flatten(0, 1).mT @ attended.flatten(2).flatten(0, 1)
    if needs[5]:
        found[5] = gradient.sum((0, 1))
    if needs[6]:
        found[6] = gradient.clone(memory_format=torch.contiguous_format)  # a result may not be an argument
    return [x for x, need in zip(found, needs) if need]


@triton.jit(do_not_specialize=["N", "T", "H"])
def _attend_kernel(
    hidden_states, query_weight, key, value, result, hidden_b, hidden_n, hidden_c, weight_o, weight_c,
    key_b, key_t, key_h, key_d, value_b, value_t, value_h, value_d, scale, N, C, T, H,
    d: tl.constexpr, ALIGNED: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """result[b, n, h] = softmax(scale · (x W_Q,hᵀ) K_hᵀ) V_h, of a tile of n, one head and one batch row."""
    h = (tl.program_id(0) % H).to(tl.int64)  # heads of one tile side by side: they read the same hidden states
    n = (tl.program_id(0) // H) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    hidden_states += b * hidden_b
    query_weight += h * d * weight_o
    c0 = tl.arange(0, D0)
    q0 = tl.zeros((BLOCK_N, D0), tl.float32)
    q1 = tl.zeros((BLOCK_N, D1 if D1 > 0 else 16), tl.float32)
    for start in range(0, C, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)
        x = load_tile(hidden_states, n, channels, hidden_n, hidden_c, N, C)
        w0 = load_tile(query_weight, c0, channels, weight_o, weight_c, d, C)
        q0 = add_product(q0, x, tl.trans(w0), PRECISION)
        if D1 > 0:
            w1 = load_tile(query_weight, D0 + tl.arange(0, D1), channels, weight_o, weight_c, d, C)
            q1 = add_product(q1, x, tl.trans(w1), PRECISION)
    dtype = result.dtype.element_ty
    q0, q1 = rounded(q0, dtype), rounded(q1, dtype)

    k00, k01, k10, k11 = _four_tiles(key + b * key_b + at_head(h, key_h, ALIGNED), key_t, key_d, T, d, T0, T1, D0, D1)
    s0, s1, largest = scores(q0, q1, k00, k01, k10, k11, scale, T, T0, T1, D1, PRECISION)
    p0, p1, share = _softmax(s0, s1, largest, T1)
    v00, v01, v10, v11 = _four_tiles(value + b * value_b + at_head(h, value_h, ALIGNED), value_t, value_d, T, d, T0, T1, D0, D1)
    result += (b * N * H + h) * d
    store_tile(result, along(p0, p1, v00, v10, T1, PRECISION) * share[:, None], n, c0, H * d, N, d)
    if D1 > 0:
        o1 = along(p0, p1, v01, v11, T1, PRECISION) * share[:, None]
        store_tile(result, o1, n, D0 + tl.arange(0, D1), H * d, N, d)


@triton.jit
def _four_tiles(
    base, base_t, base_d, T, d: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):
    """One head's keys or values; pieces that are not there stand for the first."""
    t0, c0 = tl.arange(0, T0), tl.arange(0, D0)
    x00 = load_tile(base, t0, c0, base_t, base_d, T, d)
    x01, x10, x11 = x00, x00, x00
    if D1 > 0:
        x01 = load_tile(base, t0, D0 + tl.arange(0, D1), base_t, base_d, T, d)
    if T1 > 0:
        x10 = load_tile(base, T0 + tl.arange(0, T1), c0, base_t, base_d, T, d)
    if T1 > 0 and D1 > 0:
        x11 = load_tile(base, T0 + tl.arange(0, T1), D0 + tl.arange(0, D1), base_t, base_d, T, d)
    return x00, x01, x10, x11


@triton.jit
def _softmax(s0, s1, largest, T1: tl.constexpr):
    """Both pieces of the weights before division, and what to multiply by instead."""
    p0 = tl.exp2(s0 - largest[:, None])
    p1 = p0
    total = tl.sum(p0, 1)
    if T1 > 0:
        p1 = tl.exp2(s1 - largest[:, None])
        total += tl.sum(p1, 1)
    return p0, p1, 1.0 / total


@triton.jit(do_not_specialize=["N", "T", "H"])
def _weigh_kernel(
    hidden_states, key, result, hidden_b, hidden_n, hidden_c, key_b, key_t, key_h, key_c, scale, N, C, T, H,
    T0: tl.constexpr, T1: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """result[b, n, h] = softmax(scale · x K'_hᵀ), of a tile of n, one head and one batch row."""
    h = (tl.program_id(0) % H).to(tl.int64)
    n = (tl.program_id(0) // H) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    hidden_states += b * hidden_b
    key += b * key_b + h * key_h
    t0 = tl.arange(0, T0)
    s0 = tl.zeros((BLOCK_N, T0), tl.float32)
    s1 = tl.zeros((BLOCK_N, T1 if T1 > 0 else 16), tl.float32)
    for start in range(0, C, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)
        x = load_tile(hidden_states, n, channels, hidden_n, hidden_c, N, C)
        k0 = load_tile(key, t0, channels, key_t, key_c, T, C)
        s0 = add_product(s0, x, tl.trans(k0), PRECISION)
        if T1 > 0:
            k1 = load_tile(key, T0 + tl.arange(0, T1), channels, key_t, key_c, T, C)
            s1 = add_product(s1, x, tl.trans(k1), PRECISION)
    s0 = tl.where(t0[None, :] < T, s0 * (scale * LOG2_E), float("-inf"))
    largest = tl.max(s0, 1)
    if T1 > 0:
        s1 = tl.where((T0 + tl.arange(0, T1))[None, :] < T, s1 * (scale * LOG2_E), float("-inf"))
        largest = tl.maximum(largest, tl.max(s1, 1))
    p0, p1, share = _softmax(s0, s1, largest, T1)
    width: tl.constexpr = T0 + T1
    result += (b * N * H + h) * width
    store_tile(result, p0 * share[:, None], n, t0, H * width, N, width)
    if T1 > 0:
        store_tile(result, p1 * share[:, None], n, T0 + tl.arange(0, T1), H * width, N, width)


@triton.jit(do_not_specialize=["rows", "N", "T"])
def _project_kernel(
    left, right, bias, residual, result, right_b, right_h, right_k, right_c, bias_c, residual_b, residual_n, residual_c,
    rows, N, K, C, T,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """result[r] = residual[r] + bias + Σ_k left[r, k] right[b, k], r being all batch rows' tokens in turn, `rows` per b.

    GROUP: k is h · GROUP + t, of which t < T exist; 0: k is one number.
    """
    tiles = tl.cdiv(C, BLOCK_C)
    own = (tl.program_id(0) // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(1).to(tl.int64)
    left += b * rows * K
    right += b * right_b
    sum = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = load_tile(left, own, k, K, 1, rows, K)
        if GROUP > 0:
            lines = (k // GROUP).to(tl.int64) * right_h + (k % GROUP) * right_k
            inside = ((k < K) & (k % GROUP < T))[:, None] & (c < C)[None, :]
            y = tl.load(right + lines[:, None] + c.to(tl.int64)[None, :] * right_c, mask=inside, other=0.0)
        else:
            y = load_tile(right, k, c, right_k, right_c, K, C)
        sum = add_product(sum, x, y, PRECISION)
    r = b * rows + own
    if bias is not None:
        sum += tl.load(bias + c * bias_c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        lines = (r // N) * residual_b + (r % N) * residual_n
        inside = (own < rows)[:, None] & (c < C)[None, :]
        pointers = residual + lines[:, None] + c.to(tl.int64)[None, :] * residual_c
        sum += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    store_tile(result + b * rows * C, sum, own, c, C, rows, C)
