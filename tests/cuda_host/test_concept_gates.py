"""The CUDA source of `concept_gates`, run on the CPU, against the plain formula."""

import pytest
import torch

from ..kernels import cases
from .host import Refused

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def test_workspace(host):
    """None up to 128 places; beyond, what each block of 16 tokens keeps: R, a column per token, and the energies."""
    needed = {J: host.workspace_bytes("concept_gates", **cases.make(B=2, J=J, D=200, T=17).arguments("concept_gates")) for J in (0, 128, 129)}
    assert needed == {0: 0, 128: 0, 129: 4 * 2 * 2 * (129 * 129 + 16 * 129 + 129)}
    arguments = cases.make(B=2, J=129, D=200, T=17).arguments("concept_gates")
    for workspace in (torch.empty(needed[129] // 4 - 1), torch.empty(0), torch.empty(needed[129] // 4 + 1)[1:]):
        message = f"concept_gates: workspace must have {needed[129]} bytes from a 16-byte aligned address on; got {4 * len(workspace)} from"
        with pytest.raises(Refused, match=message) as refused:
            host.concept_gates(workspace, **arguments)
        assert refused.value.status == 1


def apart(x):
    """The same values, every second element of rows twice as long."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("wide", (True, False), ids=("wide", "narrow"))
@pytest.mark.parametrize(
    "J, T, D, dtype",
    [(1, 16, 64, torch.float16), (3, 77, 96, torch.bfloat16), (8, 40, 600, torch.float16), (8, 5, 64, torch.float32)],
)
def test_a_block_reads_each_byte_once(host, J, T, D, dtype, wide):
    """Its tokens, J rows of both tables, index, bias and temperature; rows 16 bytes at a time where their layout allows it."""
    case = cases.make(B=2, T=T, J=J, D=D, dtype=dtype)
    arguments = {name: x[1:] if name not in ("targets", "metric_targets") else x for name, x in case.arguments("concept_gates").items()}
    if not wide:
        arguments |= {name: apart(arguments[name]) for name in ("encodings", "targets", "metric_targets")}
    assert (arguments["index"] >= 0).all()
    host.configure()
    host.concept_gates(**arguments)
    counted, blocks = host.counted(), -(-T // 16)
    rows, places = T * D * arguments["encodings"].element_size() + blocks * 2 * J * D * 4, blocks * J * 3 * 4
    assert (counted["read_wide"], counted["read_narrow"]) == ((rows, places) if wide else (0, rows + places))
    assert (counted["written_wide"], counted["written_narrow"]) == (0, 2 * T * J * 4)


def test_nothing_else_is_read(host):
    """No absent place's rows, no row without a concept, no token behind the last."""
    case = cases.make(B=4, T=20, J=4, D=64, dtype=torch.float16)
    host.configure()
    host.concept_gates(**case.arguments("concept_gates"))
    rows, used = (case.index >= 0).any(1).sum().item(), (case.index >= 0).sum().item()
    assert 0 < rows < 4 and rows < used < 4 * rows
    assert host.counted()["read_wide"] == rows * 20 * 64 * 2 + 2 * used * 2 * 64 * 4
    assert host.counted()["read_narrow"] == 2 * (4 * 4 * 4 + used * 2 * 4)
