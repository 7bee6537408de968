"""What the kernels do on the CPU, counted, against what bench/roofline.py says that a call has to move and to compute.

The least bytes are those of device memory. A kernel asks for some of them more than once, and caches answer; how often is an
exact number here, so that nothing creeps in. The other operators' counts are in their own tests.
"""

import pytest
import torch

from bench import roofline

from ..kernels import cases


def attention_case(N: int, d: int, J: int) -> dict[str, torch.Tensor]:
    """One row, all of its J places used; plain for J = 0."""
    case = cases.make(B=2, T=77, N=N, H=2, d=d, D=11, J=J, dtype=torch.float16)
    rows = {name: getattr(case, name)[1:] for name in ("query", "key", "value", "gates", "components", "index")}
    return {**case.arguments("edited_attention"), **rows} if J else {name: rows[name] for name in ("query", "key", "value")}


def run(host, operator: str, arguments: dict[str, torch.Tensor]) -> tuple[dict[str, int], roofline.Work]:
    host.configure(0)  # one block a head: more than one would bring K and V as often
    getattr(host, operator)(**arguments)
    return host.counted(), roofline.of(operator, arguments)


@pytest.mark.parametrize("N, d", [(256, 40), (64, 160)])
def test_plain_attention_moves_the_least_bytes(host, N, d):
    """Not 1.1 times: exactly, all of them 16 at a time; and 80/77 of the useful products."""
    counted, work = run(host, "edited_attention", attention_case(N, d, 0))
    assert (counted["read_wide"], counted["written_wide"]) == (work.read, work.written)
    assert counted["read_narrow"] == counted["written_narrow"] == 0
    assert 2 * counted["products"] == work.issued <= 1.04 * work.tensor


@pytest.mark.parametrize("J", (1, 2, 8))
def test_an_edit_costs_no_product_and_moves_the_least_bytes(host, J):
    """Tables exactly once; the coefficients of a row's tokens once for each head, and its index by each of four warps and once more."""
    d, H = 40, 2
    counted, work = run(host, "edited_attention", attention_case(64, d, J))
    plain = roofline.edited_attention(B=1, N=64, T=77, H=H, d=d)
    assert 2 * counted["products"] == work.issued == plain.issued
    assert counted["written_wide"] == work.written == plain.written
    tables, coefficients, index = 4 * J * H * d * 2, 77 * J * 2 * 4, J * 4
    assert counted["read_wide"] == plain.read + tables
    assert counted["read_narrow"] == H * (coefficients + 5 * index)
    assert work.read == plain.read + tables + coefficients + index


@pytest.mark.parametrize("layer", sum(roofline.UNETS.values(), ()), ids=lambda layer: f"N={layer.N}, d={layer.d}")
def test_edited_attention_of_a_model_moves_at_most_a_tenth_more(layer):
    """Eight concepts in every layer of the three UNets, by the counts of the test before: asked for, against the least."""
    J, T, H = 8, 77, layer.H
    least = roofline.edited_attention(B=1, N=layer.N, T=T, H=H, d=layer.d, J=J).bytes
    assert least + (H - 1) * T * J * 2 * 4 + (5 * H - 1) * J * 4 <= 1.1 * least
