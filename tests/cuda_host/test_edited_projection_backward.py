"""The CUDA source of `edited_projection`'s derivatives, run on the CPU, against the reference in float64.

test_mutants.py calls some of these tests with a changed library.
"""

import math

import pytest
import torch

from perfusion_kernels.reference.edited_projection import edited_projection_backward

from ..kernels import cases
from ..kernels.tolerance import assert_no_worse, exactly
from .host import Refused
from .test_edited_projection import EDIT, HALVES, everywhere, small
from .test_operators import far

NEEDS = ("encodings", "gates", "components", "outputs", "projected_targets")


def gradient_of(arguments, seed=0):
    shape = (*arguments["encodings"].shape[:2], arguments["weight"].shape[0])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(arguments["encodings"].dtype)


NAMES = ("encodings", "weight", "gates", "components", "index", "outputs", "projected_targets")


def reference(gradient, arguments):
    return edited_projection_backward(gradient, *cases.positional("edited_projection", arguments), (True,) * 7)


def compare(host, case, needs=NEEDS):
    """Each derivative against the reference's in the same dtype, both against float64: over all, and for each concept."""
    arguments = case.arguments("edited_projection")
    gradient = gradient_of(arguments)
    found = host.edited_projection_backward(gradient, needs, **arguments)
    same = dict(zip(NAMES, reference(gradient, arguments)))
    exact = dict(zip(NAMES, exactly(reference, gradient.double(), case.double().arguments("edited_projection"))))
    slots = torch.arange(arguments["outputs"].shape[0])[:, None]
    for name, mine in found.items():
        if mine.numel():
            assert_no_worse(mine, same[name], exact[name], slots if name in ("outputs", "projected_targets") else case.index)


@pytest.mark.parametrize("T, D, O, J", [(77, 70, 136, 3), (12, 8, 300, 11), (1, 1, 1, 1), (16, 131, 43, 2), (9, 136, 520, 8), (4, 9, 8, 1)])
def test_every_derivative(host, T, D, O, J):
    compare(host, small(B=3, T=T, D=D, O=O, J=J, dtype=HALVES[T % 2], seed=T))


def test_splits(host):
    """As many parts of the sum over O as there are multiprocessors to take them, the last one shorter."""
    case = small(B=2, T=30, D=130, O=1100, J=1)
    arguments = case.arguments("edited_projection")
    bytes_of_part = 4 * 60 * 136
    for multiprocessors, splits in ((0, 1), (4, 2), (1000, 4)):
        host.configure(multiprocessors)
        assert host.projection_workspace_bytes(**arguments) == splits * bytes_of_part
        compare(host, case, ("encodings",))


@pytest.mark.parametrize("tables", (torch.float16, torch.bfloat16, torch.float32))
def test_tables_of_another_dtype(host, tables):
    case = small(O=72, dtype=torch.bfloat16)
    compare(host, case.map(lambda name, x: x.to(tables) if name in ("value_outputs", "value_targets") else x), NEEDS[1:])


def test_any_order(host):
    """Every sum has one order, whatever that of the threads, and whatever else is asked for."""
    arguments = small(B=2, T=9, D=20, O=520, J=9).arguments("edited_projection")
    gradient, results = gradient_of(arguments), []
    for order in ("forward", "backward", "shuffled"):
        host.configure(8, order=order)
        results.append(host.edited_projection_backward(gradient, NEEDS, **arguments))
    alone = {name: host.edited_projection_backward(gradient, [name], **arguments)[name] for name in NEEDS}
    for other in (*results[1:], alone):
        assert all(torch.equal(other[name], results[0][name]) for name in NEEDS)
    assert all(torch.isfinite(x).all() for x in results[0].values())


def test_without_an_edit(host):
    """index and all that belongs to it may be absent, as in the forward."""
    arguments = small().arguments("edited_projection")
    plain = {name: x for name, x in arguments.items() if name not in EDIT}
    found = host.edited_projection_backward(gradient_of(arguments), ["encodings"], **plain)["encodings"]
    assert torch.equal(found, host.edited_projection_backward(gradient_of(arguments), ["encodings"], **arguments)["encodings"])


def test_bytes_of_the_encodings_gradient(host):
    """What the model says, to the byte: one tile within 1.1 of the least, but for the parts; more of them as they come."""
    for T, D, O, multiprocessors in ((77, 128, 640, 0), (77, 128, 640, 2), (161, 264, 192, 0)):
        arguments = small(B=1, T=T, D=D, O=O, J=1).arguments("edited_projection")
        host.configure(multiprocessors)
        splits = host.projection_workspace_bytes(**arguments) // (4 * T * D)
        host.edited_projection_backward(gradient_of(arguments), ["encodings"], **arguments)
        counted, rows, columns = host.counted(), math.ceil(T / 80), math.ceil(D / 128)
        assert (counted["read_narrow"], counted["written_narrow"]) == (0, 0)
        assert counted["read_wide"] == 2 * (columns * T * O + rows * O * D) + 4 * splits * T * D
        assert counted["written_wide"] == 4 * splits * T * D + 2 * T * D
        assert counted["products"] == rows * 80 * columns * 128 * O


def test_bytes_of_the_edit_s_gradients(host):
    """The result's gradient once per side, and the tables once per two tokens: what the model says."""
    T, O, J = 77, 264, 3
    arguments = everywhere(small(B=1, T=T, O=O, J=J).arguments("edited_projection"))
    gradient = gradient_of(arguments)
    host.configure()
    host.edited_projection_backward(gradient, ("gates", "components"), **arguments)
    assert host.counted()["read_wide"] == 2 * (2 * T * O + 39 * J * 2 * O)
    assert host.counted()["written_narrow"] == 2 * 4 * T * J
    host.configure()
    host.edited_projection_backward(gradient, ("outputs", "projected_targets"), **arguments)
    assert host.counted()["read_wide"] == 2 * J * 2 * T * O
    assert (host.counted()["written_wide"], host.counted()["written_narrow"]) == (2 * (J + 3) * 2 * O, 0)


def test_sides_and_slots_share_the_gradient(host):
    """More of the result's gradient than the cache holds: either launch brings it once, and each table's rows."""
    T, O, J = 77, 4096, 3
    arguments = everywhere(small(B=1, T=T, O=O, J=J).arguments("edited_projection"))
    gradient, slots = gradient_of(arguments), arguments["outputs"].shape[0]
    host.configure(2, cache=256 << 10)
    host.edited_projection_backward(gradient, NEEDS[1:], **arguments)
    (_, read, _), (_, again, written) = host.counted()["traffic"]
    coefficients, tables = 2 * T * J * 4, 2 * J * O * 2
    assert read <= 1.1 * (2 * T * O + tables + 4 * J)
    assert again <= 1.1 * (2 * T * O + coefficients + 4 * J) and written == 2 * slots * O * 2


def test_rows_farther_apart_than_32_bits_count(host):
    arguments = small(J=1).arguments("edited_projection")
    given = {"gradient": gradient_of(arguments), **arguments}
    expected = host.edited_projection_backward(needs=NEEDS, **given)
    for name, x in given.items():
        found = host.edited_projection_backward(needs=NEEDS, **{**given, name: far(x)})
        assert all(torch.equal(found[each], expected[each]) for each in NEEDS), name
    for name, x in expected.items():
        assert torch.equal(host.edited_projection_backward(needs=(), results={name: far(x)}, **given)[name], x)


def test_what_is_not_finite_stays_in_its_row(host):
    arguments = small().arguments("edited_projection")
    gradient = gradient_of(arguments)
    needs = ("encodings", "gates", "components")
    expected = host.edited_projection_backward(gradient, needs, **arguments)
    gradient[1, 2, 3] = torch.nan
    found = host.edited_projection_backward(gradient, needs, **arguments)
    for name in needs:
        assert found[name][1, 2].isnan().all()
        found[name][1, 2] = expected[name][1, 2]
        assert torch.equal(found[name], expected[name])


def test_empty(host):
    """Without rows there is nothing to sum: zeros, where there is something to write."""
    case = small(B=2, T=3, J=1)
    arguments = case.arguments("edited_projection")
    for rows in (dict(B=0), dict(T=0)):
        B, T = rows.get("B", 2), rows.get("T", 3)
        none = {**arguments, "encodings": torch.ones(B, T, 19).half(), "gates": torch.ones(B, T, 1), "components": torch.ones(B, T, 1), "index": arguments["index"][:B]}
        found = host.edited_projection_backward(torch.ones(B, T, 24).half(), NEEDS, **none)
        assert found["encodings"].numel() == 0 and (found["outputs"] == 0).all() and (found["projected_targets"] == 0).all()
    none = {**arguments, "weight": torch.ones(0, 19).half(), "outputs": torch.ones(4, 0).half(), "projected_targets": torch.ones(4, 0).half()}
    found = host.edited_projection_backward(torch.ones(2, 3, 0).half(), NEEDS, **none)
    assert all((x == 0).all() for x in found.values())


def test_refusals(host):
    arguments = small().arguments("edited_projection")
    gradient = gradient_of(arguments)
    results = {"encodings": torch.empty(4, 13, 19)}
    for needs, changes, status, message in (
        (NEEDS, {"gradient": gradient.float()}, 2, "edited_projection_backward: gradient must be float16 or bfloat16; got float32"),
        (NEEDS, {"weight": arguments["weight"].bfloat16()}, 1, "weight must be float16; got bfloat16"),
        (NEEDS, {"results": results}, 1, "encodings_gradient must be float16; got float32"),
        (["gates"], {"projected_targets": None, "index": arguments["index"].long().float()}, 1, "index must be int32; got float32"),
        (["components"], {"projected_targets": None, "results": {"components": torch.empty(4, 13, 2)}}, 1, "projected_targets must be given; got NULL"),
        (["outputs"], {"gates": arguments["gates"].half()}, 1, "gates must be float32; got float16"),
    ):
        call = {"gradient": gradient, **arguments, **changes}
        with pytest.raises(Refused, match=message) as refused:
            host.edited_projection_backward(needs=[name for name in needs if name not in call.get("results", {})], **call)
        assert refused.value.status == status
    with pytest.raises(Refused, match=r"workspace must have \d+ bytes from a 16-byte aligned address on; got 4 from 0x"):
        host.edited_projection_backward(gradient, NEEDS, workspace=torch.empty(1), **arguments)
    host.configure(shared_per_block=65536)
    with pytest.raises(Refused, match="edited_projection_backward: a block needs 86784 bytes of shared memory; this device has 65536"):
        host.edited_projection_backward(gradient, NEEDS, **arguments)
