"""Which implementation runs, who says so, and what is said when it cannot."""

import re
import subprocess
import sys
import types

import pytest
import torch

import perfusion_kernels
from perfusion_kernels import BackendUnavailable, backend, concept_gates, use_backend
from perfusion_kernels.registration import LIBRARY, Operator, bind

from . import cases


@pytest.fixture
def arguments():
    return cases.make().arguments("concept_gates")


@pytest.fixture
def stand_in(monkeypatch):
    """A Triton backend of one operator, which counts its calls and refuses float64; gone after the test."""
    operator = Operator(
        "concept_gates",
        lambda encodings, targets, *rest: (encodings.new_empty(1), encodings.new_empty(1)),
        lambda ctx, inputs, output: None,
        lambda ctx, *gradients: (None,) * 6,
    )
    calls = []

    def implementation(encodings, *rest):
        calls.append(encodings.shape)
        return encodings.new_zeros(1), encodings.new_zeros(1)

    implementations = {"reference": backend._implementations["concept_gates"]["reference"]}
    monkeypatch.setitem(backend._implementations, "concept_gates", implementations)
    monkeypatch.setattr(backend, "bind", lambda operator, name, function: stand_in_overload(operator, function))
    backend.register(
        "triton",
        operator,
        implementation,
        unsupported=lambda encodings, *rest: "float64 is not supported" if encodings.dtype == torch.float64 else None,
    )
    return calls


_overloads = []


def stand_in_overload(operator, function):
    """Overloads live as long as the process: one for all tests, with a function that can be changed."""
    if not _overloads:
        holder = types.SimpleNamespace()
        _overloads.append((holder, bind(operator, "standin", lambda *arguments: holder.function(*arguments))))
    holder, overload = _overloads[0]
    holder.function = function
    return overload


def test_the_reference_has_every_operator():
    status = {status.name: status for status in perfusion_kernels.available_backends()}
    assert tuple(status) == ("cuda", "triton", "reference")
    assert set(status["reference"].operators) == set(cases.PUBLIC) and not status["reference"].reason
    for name in ("cuda", "triton"):
        assert status[name].available or (status[name].reason and status[name].reason in str(status[name]))


def test_the_first_that_does_not_refuse_is_taken(arguments, stand_in):
    concept_gates(**arguments)
    assert len(stand_in) == 1
    double = {n: x.double() if x.is_floating_point() else x for n, x in arguments.items()}
    assert concept_gates(**double)[0].dtype == torch.float64  # the reference took it
    assert len(stand_in) == 1


def test_keyword_before_context_before_automatic(arguments, stand_in):
    with use_backend("reference"):
        concept_gates(**arguments)
        assert len(stand_in) == 0
        concept_gates(**arguments, backend="triton")
        with use_backend("auto"):
            concept_gates(**arguments)
        concept_gates(**arguments, backend="auto")
        assert len(stand_in) == 3
    concept_gates(**arguments)
    assert len(stand_in) == 4


def test_a_compiled_function_follows_the_choice(arguments, stand_in):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: concept_gates(**x), fullgraph=True, backend="eager")
    compiled(arguments)
    assert len(stand_in) == 1
    with use_backend("reference"):
        compiled(arguments)
    assert len(stand_in) == 1
    compiled(arguments)
    assert len(stand_in) == 2


def test_an_absent_backend_is_an_error_that_says_why(arguments, monkeypatch):
    monkeypatch.setitem(backend._absent, "cuda", "ImportError: libfoo.so.1 is missing")
    monkeypatch.setitem(
        backend._implementations,
        "concept_gates",
        {"reference": backend._implementations["concept_gates"]["reference"]},
    )
    message = re.escape(
        "concept_gates: backend 'cuda' was asked for but cannot run this call: ImportError: libfoo.so.1 is missing."
        " Can run it: reference"
    )
    with pytest.raises(BackendUnavailable, match=message):
        concept_gates(**arguments, backend="cuda")
    with pytest.raises(BackendUnavailable, match=message), use_backend("cuda"):
        concept_gates(**arguments)


def test_a_refused_call_is_an_error_that_says_why(arguments, stand_in):
    double = {n: x.double() if x.is_floating_point() else x for n, x in arguments.items()}
    with pytest.raises(BackendUnavailable, match="'triton' .* float64 is not supported. Can run it: reference"):
        concept_gates(**double, backend="triton")


def test_unknown_names_are_refused(arguments):
    with pytest.raises(BackendUnavailable, match="there is no such backend, only cuda, triton, reference"):
        concept_gates(**arguments, backend="opencl")
    message = "use_backend: backend must be one of auto, cuda, triton, reference; got 'opencl'"
    with pytest.raises(ValueError, match=message), use_backend("opencl"):
        pass


def test_registration_refuses_unknown_and_second():
    operator = perfusion_kernels.backend.Operator("concept_gates", None, None, None)
    with pytest.raises(ValueError, match="already has a reference implementation"):
        backend.register("reference", operator, None)
    with pytest.raises(ValueError, match="backend must be one of"):
        backend.register("opencl", operator, None)


def test_a_failed_import_is_remembered(monkeypatch):
    monkeypatch.setattr(backend, "_absent", {})
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())

    def broken(name):
        raise ImportError("no module named triton")

    monkeypatch.setattr(backend.importlib, "import_module", broken)
    backend.load("triton")
    assert backend._absent == {"triton": "ImportError: no module named triton"}


def test_the_environment_variable_is_read():
    code = (
        "import torch, perfusion_kernels as p; x = torch.ones(1, 1, 1); i = torch.zeros(1, 1, dtype=torch.int32)\n"
        "p.sdpa._attend = None  # a call that names no backend\n"
        "try: p.concept_gates(x, x[0], x[0], i, x[0], x[0]); p.edited_attention(x[None], x[None], x[None]); print('ran')\n"
        "except p.BackendUnavailable as error: print(error)"
    )
    for value, expected in (("reference", "ran"), ("nonsense", "backend 'nonsense' was asked for")):
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env={"PERFUSION_BACKEND": value, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
        )
        assert expected in ran.stdout, ran.stderr


def test_operators_are_overloads_of_one_name():
    assert LIBRARY.ns == "perfusion_kernels"
    for name in cases.PUBLIC:
        assert str(cases.overload_of(name)) == f"perfusion_kernels.{name}.reference"
