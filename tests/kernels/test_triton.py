"""The Triton backend as a whole: where it runs, when it is chosen, what its interpreter gets wrong."""

import sys

import pytest
import torch
import triton
import triton.language as tl

import perfusion_kernels
from perfusion_kernels import BackendUnavailable, backend
from perfusion_kernels.triton import OPERATORS, device

from . import cases

pytestmark = pytest.mark.numeric
HERE = "cuda" if torch.cuda.is_available() else "cpu"


def test_it_has_the_operators_of_its_folder():
    status = {status.name: status for status in perfusion_kernels.available_backends()}["triton"]
    assert set(status.operators) == set(OPERATORS) >= {"concept_gates", "edited_projection"}


def test_without_triton_the_reason_is_told(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("perfusion_kernels.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(backend, "_absent", {})
    backend.load("triton")
    assert "ModuleNotFoundError" in backend._absent["triton"] and "triton" in backend._absent["triton"]


def test_host_memory_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(device, "_interpreted", False)
    arguments = cases.make().arguments("concept_gates")
    with pytest.raises(BackendUnavailable, match="need tensors on a GPU; got cpu. Can run it: reference"):
        perfusion_kernels.concept_gates(**arguments, backend="triton")


def test_the_interpreter_is_not_chosen_unasked():
    arguments = cases.make().arguments("concept_gates").values()
    assert backend.select("concept_gates", tuple(arguments)) is cases.overload_of("concept_gates")


def test_float64_is_refused_wherever_it_is():
    for name in ("encodings", "outputs", "gates"):
        arguments = cases.make(device=HERE).arguments("edited_projection")
        for other in {"encodings": ("weight",), "outputs": ("projected_targets",), "gates": ("components",)}[name]:
            arguments[other] = arguments[other].double()
        arguments[name] = arguments[name].double()
        with pytest.raises(BackendUnavailable, match="float64"):
            perfusion_kernels.edited_projection(**arguments, backend="triton")
        perfusion_kernels.edited_projection(**arguments)


@triton.jit
def _product(x, y, result, N: tl.constexpr):
    n = tl.arange(0, N)
    square = n[:, None] * N + n[None, :]
    tl.store(result + square, tl.dot(tl.load(x + square), tl.load(y + square)))


def test_products_of_bfloat16_are_wrong_in_the_interpreter_alone():
    """Why kernels under the interpreter widen them; when this fails with the interpreter, they need not any more."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.ones(16, 16, dtype=dtype, device=HERE)
        result = torch.empty(16, 16, device=HERE)
        _product[(1,)](x, x, result, N=16)
        right = bool((result == 16).all())
        assert right == (dtype == torch.float16 or not device._interpreted)


@triton.jit
def _convert(x, cut, nearest, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(cut + n, tl.load(x + n).to(cut.dtype.element_ty))
    tl.store(nearest + n, device.rounded(tl.load(x + n), nearest.dtype.element_ty))


def test_the_interpreter_cuts_bfloat16_off_and_rounded_does_not():
    """Why stores go through `rounded`; when this fails with the interpreter, `.to` is enough."""
    x = torch.linspace(-3, 3, 128, device=HERE)
    x[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.3e38])
    for dtype in (torch.float16, torch.bfloat16):
        cut, nearest = (torch.empty(128, dtype=dtype, device=HERE) for _ in range(2))
        _convert[(1,)](x, cut, nearest, N=128)
        torch.testing.assert_close(nearest, x.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(cut[4:], x[4:].to(dtype)) == (dtype == torch.float16 or not device._interpreted)
