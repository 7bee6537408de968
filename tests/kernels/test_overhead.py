"""What an eager call costs beside the work: checks made once, autograd passed over where it has nothing to do."""

import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from perfusion_kernels import backend, edited_projection
from perfusion_kernels import shape_checks as checks
from perfusion_kernels.schemas import SCHEMAS

from . import cases


@pytest.fixture
def counted():
    """A check that refuses rows of 3, and what it was called with."""
    calls = []

    def check(x, y=None):
        calls.append((x, y))
        if x.shape[0] == 3:
            raise ValueError("three")

    return checks.once(check), calls


def test_a_check_is_made_once_for_each_shape_dtype_and_presence(counted):
    check, calls = counted
    x = torch.zeros(2, 4)
    seen = [(x,), (x.half(),), (x[:1],), (x, x), (x, x[:1]), (x, None), (x.to("meta"),)]
    for _ in range(2):
        for tensors in seen:
            check(*tensors)
    assert len(calls) == len(seen)
    check(torch.nn.Parameter(x))  # another kind of tensor, once more
    with torch.autocast("cpu", torch.bfloat16):
        check(x)
        check(x + 1)
    assert len(calls) == len(seen) + 2


def test_a_refusal_is_not_remembered(counted):
    check, calls = counted
    for _ in range(3):
        with pytest.raises(ValueError, match="three"):
            check(torch.zeros(3))
    assert len(calls) == 3


def test_nothing_is_remembered_of_subclasses_or_of_what_is_no_tensor(counted):
    check, calls = counted
    with FakeTensorMode():
        fake = torch.zeros(2)
    for _ in range(2):
        check(fake)
        with pytest.raises(AttributeError):
            check(None)
        with pytest.raises(AttributeError):
            check([2])
    assert len(calls) == 6


def test_memory_for_checks_is_bounded(counted, monkeypatch):
    check, calls = counted
    monkeypatch.setattr(checks, "REMEMBERED", 2)
    for size in (1, 2, 4, 1, 1):
        check(torch.zeros(size))
    assert len(calls) == 4  # the third forgot the first


def test_a_second_call_checks_nothing_again_and_a_wrong_one_is_refused(monkeypatch):
    arguments = cases.make(T=11, D=23).arguments("edited_projection")
    edited_projection(**arguments)
    monkeypatch.setattr(checks.Arguments, "__call__", lambda *_: pytest.fail("checked again"))
    edited_projection(**arguments)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="weight must have shape"):
        edited_projection(**{**arguments, "weight": arguments["weight"][:, 1:]})
    edited_projection(**arguments)


def test_autograd_is_passed_over_only_where_nothing_needs_it(monkeypatch):
    arguments = cases.make().arguments("edited_projection")
    recorded = []
    guard = torch._C._AutoDispatchBelowAutograd
    monkeypatch.setattr(torch._C, "_AutoDispatchBelowAutograd", lambda: recorded.append(1) or guard())

    def run(**changes):
        del recorded[:]
        result = edited_projection(**{**arguments, **changes})
        return bool(recorded), result

    with torch.no_grad():
        assert run(weight=arguments["weight"].clone().requires_grad_())[0]
    assert run()[0] and not run()[1].requires_grad
    for name in ("weight", "outputs", "gates"):
        leaf = arguments[name].nan_to_num().requires_grad_()
        result = run(**{name: leaf}, validate=False)[1]
        result.sum().backward()
        assert leaf.grad.abs().sum() > 0


def test_the_overhead_of_every_operator_is_measured():
    sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
    try:
        import overhead
    finally:
        del sys.path[0]
    before = {name: backend._implementations[name] for name in SCHEMAS}
    rows = overhead.overheads(calls=2, rounds=2)
    assert [row["operator"] for row in rows] == list(SCHEMAS)
    assert all(row["call"] > row["empty_like"] > 0 and min(row["fresh"], row["unvalidated"]) > 0 for row in rows)
    assert all(backend._implementations[name] is before[name] for name in SCHEMAS)
