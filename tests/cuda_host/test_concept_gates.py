"""The CUDA source of `concept_gates`, run on the CPU, against the plain formula."""

import pytest
import torch

from ..kernels import cases
from .host import Refused, compare

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def compare_exactly_absent(host, case):
    compare(host, "concept_gates", case)
    absent = (case.index < 0)[:, None].expand_as(case.gates)
    for result in host.concept_gates(**case.arguments("concept_gates")):
        assert (result[absent] == 0).all() and torch.isfinite(result).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(host, dtype):
    compare_exactly_absent(host, cases.make(J=3, dtype=dtype))


@pytest.mark.parametrize("J", (*range(9), 11, 19))
def test_any_number_of_concepts(host, J):
    compare_exactly_absent(host, cases.make(J=J, D=48, T=5, seed=J))


@pytest.mark.parametrize("T", (1, 16, 77, 80, 154))
def test_context_lengths(host, T):
    compare_exactly_absent(host, cases.make(B=max(2, 32 // T), T=T, J=2, seed=T))


@pytest.mark.parametrize("D", (1, 7, 8, 64, 257, 520))
def test_text_widths(host, D):
    compare_exactly_absent(host, cases.make(B=2, T=3, J=1 if D == 1 else 2, D=D))


def check_mixed_rows(host):
    compare_exactly_absent(host, cases.make(B=8, J=4, D=64, seed=3))


def test_mixed_rows(host):
    check_mixed_rows(host)


def check_any_order(host):
    """The order in which threads run changes nothing."""
    for J in (5, 11):
        case = cases.make(J=J, D=40, T=18)
        results = []
        for order in ("forward", "backward", "shuffled"):
            host.configure(order=order)
            results.append(torch.stack(host.concept_gates(**case.arguments("concept_gates"))))
        assert all(torch.equal(result, results[0]) for result in results) and torch.isfinite(results[0]).all()


def test_any_order(host):
    check_any_order(host)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_poisoned_memory(host, dtype):
    compare_exactly_absent(host, cases.make(J=3, dtype=dtype, views=True))


def test_rows_are_read_16_bytes_at_a_time(host):
    """But for index, bias and temperature."""
    case = cases.make(B=1, T=16, D=64, J=1, dtype=torch.float16)
    host.configure()
    host.concept_gates(**{**case.arguments("concept_gates"), "index": torch.ones(1, 1, dtype=torch.int32), "bias": torch.ones(1, 1), "temperature": torch.ones(1, 1)})
    counted = host.counted()
    assert counted["read_wide"] == 16 * 64 * 2 + 64 * 4 * 2 + 8 * 64 * 4  # encodings, the Gram matrix, m once per warp
    assert counted["written_narrow"] == 2 * 16 * 4


def test_dependent_concepts_stay_in_their_row(host):
    case = cases.make()
    arguments = case.arguments("concept_gates")
    expected = host.concept_gates(**arguments)
    index = arguments["index"].clone()
    index[1] = 2
    gates, components = host.concept_gates(**{**arguments, "index": index})
    assert not torch.isfinite(components[1]).all()
    others = [0, 2, 3]
    assert torch.equal(gates[others], expected[0][others]) and torch.equal(components[others], expected[1][others])


def test_refusals(host):
    case = cases.make(J=2)
    arguments = case.arguments("concept_gates")
    for changes, status, message in (
        ({"targets": arguments["targets"].half()}, 1, "concept_gates: targets must be float32; got float16"),
        ({"index": arguments["bias"]}, 1, "concept_gates: index must be int32; got float32"),
        ({"index": torch.full((4, 129), -1, dtype=torch.int32)}, 2, "concept_gates: J must be at most 128; got 129"),
    ):
        with pytest.raises(Refused, match=message) as refused:
            host.concept_gates(**{**arguments, **changes})
        assert refused.value.status == status
