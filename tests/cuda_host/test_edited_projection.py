"""The CUDA source of `edited_projection`, run on the CPU, against the plain formula.

test_mutants.py calls some of these tests with a changed library.
"""

import math

import pytest
import torch

from bench import roofline

from ..kernels import cases
from .host import compare

HALVES = (torch.float16, torch.bfloat16)
TILES = {(80, 128): 0, (80, 64): 7, (32, 64): 10**6}  # by the number of multiprocessors that asks for each, with more than 32 rows
EDIT = ("gates", "components", "index", "outputs", "projected_targets")


def small(T=13, D=19, O=24, dtype=torch.float16, **sizes):
    return cases.make(T=T, D=D, H=1, d=O, N=1, dtype=dtype, **sizes)


def plainly(arguments):
    return {name: x for name, x in arguments.items() if name not in EDIT}


def bits(x):
    return x.contiguous().view(torch.int16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", TILES)
def test_every_tile(host, tile, dtype):
    """More than one tile in both directions, none of them full, and sums of several steps."""
    case = small(T=47, D=200, O=131, J=3, dtype=dtype)
    host.configure(TILES[tile])
    plan = host.planned("edited_projection", case.arguments("edited_projection"))
    assert (plan["rows"], plan["columns"]) == tile and min(plan["row_tiles"], plan["column_tiles"]) > 1
    compare(host, "edited_projection", case)


def test_rows_without_a_concept(host):
    """The bits of the plain product, signs of zeros included, beside rows that are edited."""
    for dtype in HALVES:
        arguments = small(B=6, T=20, dtype=dtype).arguments("edited_projection")
        arguments["encodings"][..., 0], arguments["weight"][:8] = 2.0**-14, 0
        arguments["weight"][:8, 0] = -(2.0**-14)  # -0.0 in float16, and -0.0 + 0.0 would be 0.0
        result, plain = host.edited_projection(**arguments), host.edited_projection(**plainly(arguments))
        none = (arguments["index"] < 0).all(-1)
        assert dtype != torch.float16 or bits(plain[none]).min() == torch.iinfo(torch.int16).min
        assert none.any() and torch.equal(bits(result[none]), bits(plain[none]))
        assert not any(torch.equal(result[row], plain[row]) for row in range(6) if not none[row])


def test_rounded_once_more(host):
    """The exact edit is added to the product's rounded value and rounded once: large terms may cancel."""
    for dtype in HALVES:
        arguments = small(J=3, dtype=dtype).arguments("edited_projection")
        arguments["gates"], arguments["components"] = 30 * arguments["gates"], 30 * arguments["components"]
        exact = {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}
        edit = cases.PUBLIC["edited_projection"](**exact) - exact["encodings"] @ exact["weight"].T
        once = host.edited_projection(**plainly(arguments)).double() + edit
        error = (host.edited_projection(**arguments).double() - once).abs()
        assert error.le(1.01 * torch.finfo(dtype).eps / 2 * once.abs() + 1e-5).all()


def model(plan, B, T, D, O, J):
    """Bytes read where every row uses every place (edited_projection.cuh), for one prompt's slots."""
    product = 2 * (plan["row_tiles"] * O * D + plan["column_tiles"] * B * T * D)
    groups = math.ceil(B * T / (plan["rows"] * plan["columns"] / 8 / 128))  # of rows, one a thread
    return product, 12 * plan["column_tiles"] * B * T * J + groups * J * 2 * 2 * O


def everywhere(arguments):
    """One prompt that uses every place."""
    J = arguments["index"].shape[1]
    arguments["index"] = torch.arange(1, J + 1, dtype=torch.int32)[None]
    arguments["gates"], arguments["components"] = (torch.randn(1, arguments["encodings"].shape[1], J) for _ in range(2))
    return arguments


def test_neighbours_share_weights(host):
    """More weights than the cache holds, and two tiles of rows that read them: memory is read once, or within a tenth of that."""
    arguments = everywhere(small(B=1, T=160, D=256, O=1280, J=1).arguments("edited_projection"))
    host.configure(2, 101376, shared_per_multiprocessor=102400, cache=320 << 10)
    plan = host.planned("edited_projection", arguments)
    assert plan["row_tiles"] == 2 and 2 * 256 * 1280 > 320 << 10
    host.edited_projection(**arguments)
    [(_, read, written)] = host.counted()["traffic"]
    assert read + written <= 1.1 * roofline.of("edited_projection", arguments).bytes


@pytest.mark.parametrize("tile", TILES)
def test_bytes_of_many_tiles(host, tile):
    """What the model says, to the byte: tiles of one column of tiles read the same weights, and those of a row the same encodings."""
    B, T, D, O, J = 1, 161, 128, 136, 3
    arguments = everywhere(small(B=B, T=T, D=D, O=O, J=J).arguments("edited_projection"))
    host.configure(TILES[tile])
    plan = host.planned("edited_projection", arguments)
    assert (plan["rows"], plan["columns"]) == tile and min(plan["row_tiles"], plan["column_tiles"]) > 1
    host.edited_projection(**arguments)
    counted = host.counted()
    assert counted["read_wide"] + counted["read_narrow"] == sum(model(plan, B, T, D, O, J))
    assert counted["products"] == plan["row_tiles"] * tile[0] * plan["column_tiles"] * tile[1] * D
    assert (counted["written_wide"], counted["written_narrow"]) == (2 * T * O, 0)


def test_plan(host):
    """The largest tile that gives every multiprocessor a block: the whole of Stable Diffusion 1.5's values on 132 of them."""
    def plan(B, T, O):
        made = host.planned("edited_projection", dict(encodings=torch.empty(B, T, 8).half(), weight=torch.empty(O, 8).half()))
        return made["rows"], made["columns"], made["row_tiles"] * made["column_tiles"]

    host.configure(132)
    assert plan(2, 77, 12480) == (80, 128, 2 * 98)
    assert plan(1, 77, 12480) == (80, 64, 195)
    assert plan(1, 77, 320) == (32, 64, 3 * 5)
    assert plan(1, 16, 12480) == (32, 64, 195)
