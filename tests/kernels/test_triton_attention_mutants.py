"""Deliberate faults in Triton's attention kernels, each of which a comparison with the reference has to notice."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch

from perfusion_kernels import reference

from . import cases
from .tolerance import assert_close, exactly

pytest.importorskip("triton")

pytestmark = pytest.mark.proof

SOURCES = Path(reference.__file__).parents[1] / "triton"
DEVICE = cases.runs("edited_attention")[-1][1]

FORWARD, BACKWARD, FUSED = "edited_attention", "edited_attention_backward", "fused_edited_attention"
MUTANTS = {  # name: (file, what stands there, what the mutant has, what notices)
    "the removal added": ("edited_tiles", "- a[:, None] * p[None, :]", "+ a[:, None] * p[None, :]", FORWARD),
    "the gates of the first row": ("edited_tiles", "gates += b * gates_b", "gates += 0 * gates_b", FORWARD),
    "the tables' columns of the first head": ("edited_tiles", "outputs += h * d * outputs_c", "outputs += 0 * h", FORWARD),
    "empty places read": ("edited_tiles", "if slot >= 0:", "if slot >= -1:", FORWARD),
    "one key too many": ("attention_tiles", "tl.arange(0, T1))[None, :] < T", "tl.arange(0, T1))[None, :] <= T", FORWARD),
    "no second piece of columns": ("attention_tiles", "sum = add_product(sum, x1, tl.trans(y1), PRECISION)", "sum += 0", FORWARD),
    "half a denominator": ("edited_attention", "            total += tl.sum(p1, 1)\n", "            total += 0\n", FORWARD),
    "the last tile left out": ("edited_attention", "tl.cdiv(N, BLOCK_N)", "N // BLOCK_N", FORWARD),
    "a row's values for another's": ("edited_tiles", "value + row * value_b", "value + (1 - row) * value_b", FORWARD),
    "the projection of the first head": ("fused_edited_attention", "key_weight + h * d * key_weight_o", "key_weight", FUSED),
    "a rest of the encodings left out": ("fused_edited_attention", "range(0, D, BLOCK_K)", "range(0, D - 16, BLOCK_K)", FUSED),
    "half a mean": ("edited_attention_backward", "mean += tl.sum(p1 * dp1, 1)", "mean += 0", BACKWARD),
    "dk without its scale": ("edited_attention_backward", "dk0 * scale", "dk0", BACKWARD),
    "weights of another base": ("edited_attention_backward", "(scale * LOG2_E)", "scale", BACKWARD),
    "dv of the first part alone": ("edited_attention_backward", "parts.sum(0)", "parts[0]", BACKWARD),
    "dk without the softmax's part": ("edited_attention_backward", "PRECISION) - mean[None, :])", "PRECISION))", BACKWARD),
}


@pytest.fixture
def package(tmp_path):
    """Loads Triton's modules anew, those found in tmp_path from there; Triton reads sources from files."""
    name = f"perfusion_kernels.mutant_{tmp_path.name}"  # beside the package that it is a copy of, which relative imports lead to
    package = types.ModuleType(name)
    package.__path__ = [str(tmp_path), str(SOURCES)]
    sys.modules[name] = package
    yield lambda module: importlib.import_module(f"{name}.{module}")
    for module in [module for module in sys.modules if f"{module}.".startswith(f"{name}.")]:
        del sys.modules[module]


@pytest.fixture(scope="module")
def case():
    return cases.make(B=2, T=40, D=35, J=2, H=2, d=40, N=19, device=DEVICE, views=True)


def assert_right(package, operator, case) -> None:
    """What Triton's modules compute is the reference's result, or its derivatives."""
    forward = operator.removesuffix("_backward")
    arguments, exact = (cases.positional(forward, x.arguments(forward)) for x in (case, case.double()))
    reference = getattr(importlib.import_module(f"perfusion_kernels.reference.{forward}"), operator)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    try:
        function = getattr(package(operator), operator)
        if operator == forward:
            found, right = [function(*arguments)], exactly(reference, *exact)
        else:
            needs = [isinstance(x, torch.Tensor) and x.is_floating_point() for x in arguments]
            gradient = torch.linspace(-1, 2, case.query.numel(), device=DEVICE).view(case.query.shape)
            found = function(gradient, *arguments, needs)
            right = filter(None, exactly(reference, gradient.double(), *exact, tuple(needs)))
    finally:
        torch.use_deterministic_algorithms(False)
    for mine, truth in zip(found, right, strict=True):
        assert_close(mine, truth)


@pytest.mark.parametrize("operator", (FORWARD, BACKWARD, FUSED))
def test_the_kernels_as_they_are_agree(package, case, operator):
    assert_right(package, operator, case)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_noticed(package, case, tmp_path, mutant):
    file, right, wrong, operator = MUTANTS[mutant]
    source = (SOURCES / f"{file}.py").read_text(encoding="utf-8")
    assert source.count(right) == 1, f"{mutant}: the line to break stands {source.count(right)} times in {file}.py"
    (tmp_path / f"{file}.py").write_text(source.replace(right, wrong), encoding="utf-8")
    with pytest.raises(AssertionError):
        assert_right(package, operator, case)
