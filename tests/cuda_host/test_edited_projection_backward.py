"""The CUDA source of `edited_projection`'s derivatives, run on the CPU, against the reference in float64.

test_mutants.py calls some of these tests with a changed library.
"""

import math

import pytest
import torch

from .host import NEEDS, Refused, arguments_of, compare
from .test_edited_projection import EDIT, HALVES, everywhere, small

OPERATOR = "edited_projection_backward"


def made(**sizes):
    return arguments_of(OPERATOR, small(**sizes))


@pytest.mark.parametrize("T, D, O, J", [(77, 70, 136, 3), (12, 8, 300, 11), (1, 1, 1, 1), (16, 131, 43, 2), (9, 136, 520, 8), (4, 9, 8, 1)])
def test_every_derivative(host, T, D, O, J):
    compare(host, OPERATOR, small(B=3, T=T, D=D, O=O, J=J, dtype=HALVES[T % 2], seed=T))


def test_splits(host):
    """As many parts of the sum over O as there are multiprocessors to take them, the last one shorter."""
    case = small(B=2, T=30, D=130, O=1100, J=1)
    arguments = arguments_of(OPERATOR, case)
    bytes_of_part = 4 * 60 * 136
    for multiprocessors, splits in ((0, 1), (4, 2), (1000, 4)):
        host.configure(multiprocessors)
        assert host.workspace_bytes(OPERATOR, **arguments) == splits * bytes_of_part
        compare(host, OPERATOR, case, needs=("encodings",))


def test_without_an_edit(host):
    """index and all that belongs to it may be absent, as in the forward."""
    arguments = made()
    plain = {name: x for name, x in arguments.items() if name not in EDIT}
    found, expected = (host.edited_projection_backward(["encodings"], **each)["encodings"] for each in (plain, arguments))
    assert torch.equal(found, expected)


def test_bytes_of_the_encodings_gradient(host):
    """What the model says, to the byte: one tile within 1.1 of the least, but for the parts; more of them as they come."""
    for T, D, O, multiprocessors in ((77, 128, 640, 0), (77, 128, 640, 2), (161, 264, 192, 0)):
        arguments = made(B=1, T=T, D=D, O=O, J=1)
        host.configure(multiprocessors)
        splits = host.workspace_bytes(OPERATOR, **arguments) // (4 * T * D)
        host.edited_projection_backward(["encodings"], **arguments)
        counted, rows, columns = host.counted(), math.ceil(T / 80), math.ceil(D / 128)
        assert (counted["read_narrow"], counted["written_narrow"]) == (0, 0)
        assert counted["read_wide"] == 2 * (columns * T * O + rows * O * D) + 4 * splits * T * D
        assert counted["written_wide"] == 4 * splits * T * D + 2 * T * D
        assert counted["products"] == rows * 80 * columns * 128 * O


def test_bytes_of_the_edit_s_gradients(host):
    """The result's gradient once per side, and the tables once per two tokens: what the model says."""
    T, O, J = 77, 264, 3
    arguments = everywhere(made(B=1, T=T, O=O, J=J))
    host.configure()
    host.edited_projection_backward(("gates", "components"), **arguments)
    assert host.counted()["read_wide"] == 2 * (2 * T * O + 39 * J * 2 * O)
    assert host.counted()["written_narrow"] == 2 * 4 * T * J
    host.configure()
    host.edited_projection_backward(("outputs", "projected_targets"), **arguments)
    assert host.counted()["read_wide"] == 2 * J * 2 * T * O
    assert (host.counted()["written_wide"], host.counted()["written_narrow"]) == (2 * (J + 3) * 2 * O, 0)


def test_sides_and_slots_share_the_gradient(host):
    """More of the result's gradient than the cache holds: either launch brings it once, and each table's rows."""
    T, O, J = 77, 4096, 3
    arguments = everywhere(made(B=1, T=T, O=O, J=J))
    slots = arguments["outputs"].shape[0]
    host.configure(2, cache=256 << 10)
    host.edited_projection_backward(NEEDS[1:], **arguments)
    (_, read, _), (_, again, written) = host.counted()["traffic"]
    coefficients, tables = 2 * T * J * 4, 2 * J * O * 2
    assert read <= 1.1 * (2 * T * O + tables + 4 * J)
    assert again <= 1.1 * (2 * T * O + coefficients + 4 * J) and written == 2 * slots * O * 2


def test_empty(host):
    """Without rows there is nothing to sum: zeros, where there is something to write."""
    case = small(B=2, T=3, J=1)
    arguments = case.arguments("edited_projection")
    for rows in (dict(B=0), dict(T=0)):
        B, T = rows.get("B", 2), rows.get("T", 3)
        none = {**arguments, "encodings": torch.ones(B, T, 19).half(), "gates": torch.ones(B, T, 1), "components": torch.ones(B, T, 1), "index": arguments["index"][:B]}
        found = host.edited_projection_backward(gradient=torch.ones(B, T, 24).half(), **none)
        assert found["encodings"].numel() == 0 and (found["outputs"] == 0).all() and (found["projected_targets"] == 0).all()
    none = {**arguments, "weight": torch.ones(0, 19).half(), "outputs": torch.ones(4, 0).half(), "projected_targets": torch.ones(4, 0).half()}
    found = host.edited_projection_backward(gradient=torch.ones(2, 3, 0).half(), **none)
    assert all((x == 0).all() for x in found.values())


def test_refusals(host):
    """Of what the forward has not: gradients, what is asked for, and the workspace."""
    arguments = made()
    single, wide = torch.empty(4, 13, 19), torch.empty(4, 13, 2)
    for changes, message in (
        (dict(needs=NEEDS[1:], results={"encodings": single}), "encodings_gradient must be float16; got float32"),
        (dict(needs=["gates"], projected_targets=None, index=arguments["index"].float()), "index must be int32; got float32"),
        (dict(needs=(), results={"components": wide}, projected_targets=None), "projected_targets must be given; got NULL"),
        (dict(workspace=torch.empty(1)), r"workspace must have \d+ bytes from a 16-byte aligned address on; got 4 from 0x"),
    ):
        with pytest.raises(Refused, match=f"{OPERATOR}: {message}") as refused:
            host.edited_projection_backward(**{**arguments, **changes})
        assert refused.value.status == 1
