"""The compiled kernels, by the library's own launch plans (csrc/, built for the CPU)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import plans, roofline
from bench.chips import CHIPS
from bench.plans import KEYS, Plan, T
from bench.predictions.assumptions import DEPENDENT_LOAD, LIBRARY, PRODUCTS, REACHED
from bench.predictions.row import row

EDITED = 2, 16  # rows for which calls with concepts are predicted
PLACES = 1, 2, 4, 8


def rows(host) -> Iterator[dict]:
    """host: tests/cuda_host/host.py's."""
    for chip in CHIPS:
        for layer in plans.layers():
            for B in plans.ROWS:
                plan = plans.plan(host, chip, layer, B)
                yield attention(plan)
                yield around_attention("cuda", chip, layer, B, plan.times(), REACHED)
            yield from (attention(plans.plan(host, chip, layer, B, J)) for B in EDITED for J in PLACES)
        for unet, D in roofline.TEXT_WIDTHS.items():
            for B in EDITED:
                yield gates(chip, D, B)
                yield from projections(host, chip, unet, B)
                yield backward(host, chip, unet, B)
                yield from (fused(host, chip, layer, D, B) for layer in roofline.UNETS[unet])


def columns(unet: str) -> int:
    """O of a whole model: the outputs of all of its cross-attention layers."""
    return sum(layer.count * layer.C for layer in roofline.UNETS[unet])


def attention(plan: Plan) -> dict:
    layer, times = plan.layer, {name: seconds / REACHED for name, seconds in plan.times().items()}
    facts = dict(N=layer.N, H=layer.H, d=layer.d, J=plan.J, rows=plan.rows, tile_rows=16 * plan.m, blocks=plan.blocks)
    facts |= dict(resident=plan.resident, stages=plan.stages, splits=plan.splits, fill=round(plan.fill(), 3))
    return row("cuda", "edited_attention", plan.chip, facts, [times], plan.work, before={"edit": plan.edit_seconds()})


def projections(host, chip: str, unet: str, B: int) -> Iterator[dict]:
    """K, or V, of a whole model: `edited_projection` and `fused_edited_projection`, which differ in a rounding."""
    one, D, O = CHIPS[chip], roofline.TEXT_WIDTHS[unet], columns(unet)
    made = _planned(host, chip, "edited_projection", B=B, T=T, D=D, O=O)
    tiles = made["row_tiles"] * made["column_tiles"]
    work = roofline.edited_projection(B=B, T=T, D=D, O=O, J=1)
    most, elements = -(-tiles // one.multiprocessors), made["rows"] * made["columns"]
    edit = elements * 4 / 128  # cycles: two multiply-adds, two conversions
    times = {
        "tensor cores": most * (elements * D / (PRODUCTS * one.tensor) + edit) / one.clock,
        "DRAM": work.bytes / one.dram / REACHED,
        "L2": 2 * D * tiles * (made["rows"] + made["columns"]) / one.l2 / REACHED,
    }
    facts = dict(D=D, O=O, J=1, rows=B, tile_rows=made["rows"], blocks=tiles, fill=round(tiles / one.multiprocessors / most, 3))
    for kernel in ("edited_projection", "fused_edited_projection"):
        yield row("cuda", kernel, chip, facts, [times], work)


def fused(host, chip: str, layer: roofline.Layer, D: int, B: int) -> dict:
    """`fused_edited_attention`: a projection and an edit for each block, then its tiles of 16 rows."""
    one, sizes = CHIPS[chip], dict(T=T, H=layer.H, d=layer.d)
    made = _planned(host, chip, "fused_edited_attention", B=B, N=layer.N, D=D, **sizes)
    blocks = B * layer.H * made["splits"]
    most, padded = -(-blocks // one.multiprocessors), -(-layer.d // 16) * 16
    attention = Plan(chip, layer, B, made["warps"], 1, made["stages"], made["splits"], blocks, 1, made["bytes"], J=1)
    work = roofline.fused_edited_attention(B=B, N=layer.N, D=D, J=1, **sizes)
    tiles = max(attention.cycles().values()) * attention.most_loaded()[0]
    times = {
        "tensor cores": (most * 2 * KEYS * padded * D / (PRODUCTS * one.tensor) + tiles) / one.clock,
        "DRAM": work.bytes / one.dram / REACHED,
    }
    facts = dict(N=layer.N, H=layer.H, d=layer.d, D=D, J=1, rows=B, blocks=blocks, splits=made["splits"], fill=round(attention.fill(), 3))
    return row("cuda", "fused_edited_attention", chip, facts, [times], work, before={"edit": attention.edit_seconds()})


def gates(chip: str, D: int, B: int) -> dict:
    """`concept_gates` of one concept a row: five blocks a prompt, each of which loads D in dependent slices of 512 columns."""
    one = CHIPS[chip]
    work = roofline.concept_gates(B=B, T=T, D=D, J=1)
    slices = -(-5 * B // one.multiprocessors) * -(-D // 512)
    times = {"latency": slices * DEPENDENT_LOAD, "DRAM": work.bytes / one.dram / REACHED}
    return row("cuda", "concept_gates", chip, dict(D=D, J=1, rows=B, blocks=5 * B), [times], work)


def around_attention(backend: str, chip: str, layer: roofline.Layer, B: int, attention: dict[str, float], reached: float) -> dict:
    """`cross_attention_layer`: the library's product, `edited_attention`, the library's product with bias and residual. Queries and
    attention's result are in L2 where both fit there. attention: its seconds by resource; reached: of their rates."""
    one, M, C = CHIPS[chip], B * layer.N, layer.C
    in_l2 = 2 * 2 * M * C <= one.cache
    between = one.l2 if in_l2 else one.dram
    core = max(seconds for name, seconds in attention.items() if not (in_l2 and name == "DRAM")) / reached

    def product(tensors: int) -> float:
        """tensors: of M x C, in DRAM; one more is another launch's."""
        return max(2 * M * C * C / (LIBRARY * one.dense), 2 * ((tensors * M * C + C * C) / one.dram + M * C / between) / REACHED)

    launches = [{"to_q": product(1)}, {"attention": core}, {"to_out": product(2)}]
    work = roofline.cross_attention_layer(B=B, N=layer.N, C=C, T=T, H=layer.H, d=layer.d)
    return row(backend, "cross_attention_layer", chip, dict(N=layer.N, C=C, H=layer.H, d=layer.d, rows=B), launches, work)


def backward(host, chip: str, unet: str, B: int) -> dict:
    """The derivatives of `edited_projection` for a whole model's keys or values, one concept a row: four launches."""
    one, D, O = CHIPS[chip], roofline.TEXT_WIDTHS[unet], columns(unet)
    host.configure(**{**one.machine(), "cache": 0})
    half = torch.empty(1, dtype=torch.half)
    tensors = {"encodings": half.expand(B, T, D), "weight": half.expand(O, D), "gradient": half.expand(B, T, O)}
    splits = host.workspace_bytes("edited_projection_backward", **tensors) // (4 * B * T * D)
    works = roofline.edited_projection_backward_launches(B=B, T=T, D=D, O=O, J=1, splits=splits)
    names = "dY W", "sum of its parts", "gradients of the coefficients", "gradients of the tables"
    launches = [{name: work.bytes / one.dram / REACHED} for name, work in zip(names, works, strict=True)]
    tiles = -(-B * T // KEYS) * -(-D // 128) * splits
    products = -(-tiles // one.multiprocessors) * KEYS * 128 * O / splits / (PRODUCTS * one.tensor * one.clock)
    launches[0][names[0]] = max(launches[0][names[0]], products)
    work = roofline.edited_projection_backward(B=B, T=T, D=D, O=O, J=1)
    return row("cuda", "edited_projection_backward", chip, dict(D=D, O=O, J=1, rows=B, splits=splits), launches, work)


def _planned(host, chip: str, operator: str, **sizes: int) -> dict[str, int]:
    host.configure(**{**CHIPS[chip].machine(), "cache": 0})
    return host.planned(operator, {}, **sizes)
