"""Deliberate faults in the kernels of `cross_attention_layer`, each of which a comparison with the reference has to notice."""

import pytest
import torch

from perfusion_kernels.reference.cross_attention_layer import cross_attention_layer as law
from perfusion_kernels.triton import cross_attention_layer as kernels
from perfusion_kernels.triton import device

from . import cases
from .mutants import assert_killed
from .test_cross_attention_layer import absorbed, layer

MUTANTS = {
    "the query of the first head": ("query_weight += h * d * weight_o", "query_weight += 0 * h"),
    "no second piece of the query": ("q1 = add_product(q1, x, tl.trans(w1), PRECISION)", "q1 += 0"),
    "half a denominator": ("        total += tl.sum(p1, 1)\n", "        total += 0\n"),
    "one key too many": ("(T0 + tl.arange(0, T1))[None, :] < T, s1 * (scale", "(T0 + tl.arange(0, T1))[None, :] <= T, s1 * (scale"),
    "a rest of the heads left out": ("range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)"),
    "the first row's residual": ("(r // N) * residual_b", "(r // rows) * residual_b"),
    "absorbed values of the first row": ("right += b * right_b", "right += 0 * b"),
}


def check(module):
    """In half precision, where these kernels multiply: both forms of a layer of two rows."""
    device_type = "cpu" if device._interpreted else "cuda"
    case = cases.make(B=2, T=40, D=5, H=2, d=40, N=3, channels=70, dtype=torch.float16, device=device_type)
    for form, scale in ((layer, 0.3), (absorbed, 1.0)):
        arguments = tuple(form(case).values())
        exact = law(*(x if x is None else x.double() for x in arguments), scale)
        result = module.cross_attention_layer(*arguments, scale).double()
        error = (result - exact).abs().max()
        assert error <= 4e-3 * exact.abs().max()  # a fault is not a rounding: it is off by a hundredth at least


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name, tmp_path):
    assert_killed(check, kernels, *MUTANTS[name], tmp_path)
