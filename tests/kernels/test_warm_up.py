"""`warm_up`: every operator at every layer's shape, and a plain word where there is no GPU."""

import contextlib
import importlib
import sys

import pytest
import torch

from perfusion_kernels import BackendUnavailable, warm_up

from . import cases

MODULE = sys.modules["perfusion_kernels.warm_up"]  # the package's attribute is the function
LAYERS = [(5, 12, 2, 4), (3, 9, 1, 8), (5, 12, 2, 4)]
CHOSEN = {"a device": {"a launch": {"BLOCK_N": 16}}}


WITH_KERNELS = set(cases.PUBLIC) - {"cross_attention_layer"}  # torch's products around `edited_attention`


@pytest.fixture
def calls(monkeypatch):
    """What `warm_up` calls: (operator, results), run by the reference as if this machine had a GPU."""
    found = []

    def recorded(name, operator):
        def call(*arguments, **options):
            results = operator(*arguments, **options, backend="reference")
            found.append((name, results))
            return results

        return call

    for name in WITH_KERNELS:
        monkeypatch.setattr(MODULE, name, recorded(name, getattr(MODULE, name)))
    monkeypatch.setattr(MODULE, "_require_triton", lambda device: None)
    tuning = importlib.import_module("perfusion_kernels.triton.tuning")
    monkeypatch.setattr(tuning, "tuning", lambda: tuned(found))
    return found


@contextlib.contextmanager
def tuned(found):
    yield CHOSEN
    found.append(("tuned", ()))


@pytest.mark.parametrize("gradients", (False, True))
def test_every_operator_at_every_shape_once(calls, gradients):
    sizes = dict(rows=3, tokens=7, text_width=6, concepts=2)
    assert warm_up(LAYERS, device="cpu", dtype=torch.float32, gradients=gradients, **sizes) == CHOSEN
    assert calls.pop() == ("tuned", ())
    names = [name for name, _ in calls]
    assert set(names) == WITH_KERNELS
    shapes = {name: [tuple(result.shape) for each, result in calls if each == name] for name in set(names) - {"concept_gates"}}
    assert shapes == {
        "edited_projection": [(3, 7, 8 + 8 + 8)],
        "fused_edited_projection": [(3, 7, 8 + 8 + 8)],
        "edited_attention": [(3, 5, 2, 4), (3, 5, 2, 4), (3, 3, 1, 8), (3, 3, 1, 8)],
        "fused_edited_attention": [(3, 5, 2, 4), (3, 3, 1, 8)],
    }
    for name, results in calls:
        for result in results if isinstance(results, tuple) else (results,):
            assert result.requires_grad == gradients, name


def test_half_precision(calls):
    warm_up(LAYERS[:1], device="cpu", dtype=torch.float16)
    assert {results.dtype for name, results in calls[:-1] if name != "concept_gates"} == {torch.float16}


def test_a_device_without_triton_is_refused_by_name():
    with pytest.raises(BackendUnavailable, match="^warm_up: .*(GPU|unavailable)"):
        warm_up(LAYERS, device="meta", dtype=torch.float16)


def test_no_layers():
    with pytest.raises(ValueError, match="layers must name at least one layer; got none"):
        warm_up([], device="meta", dtype=torch.float16)
