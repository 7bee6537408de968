"""What fits, the C library says, and Python asks it: its answer is where the launch plans begin to refuse."""

import ctypes
import itertools
import math
import re

import pytest
import torch

from perfusion_kernels.cuda import library, supports

from ..kernels import cases
from .build import build_torch_library
from .c_api import params
from .host import Refused

SHARED_MEMORY = (49152, 101376, 166912, 232448)  # bytes of a block: an old device, 8.6, 8.0, 9.0


@pytest.fixture
def asked(monkeypatch):
    """`supports` of an operator for tensors in host memory, asked of the host library; caches forget it afterwards."""
    caches = (library.loaded, library.ask)

    def forget():
        for each in caches:
            each.cache_clear()

    forget()
    monkeypatch.setattr(library, "LIBRARY", build_torch_library())

    def ask(name, arguments, shared_memory):
        monkeypatch.setattr(library, "shared_memory", lambda device: shared_memory)
        return getattr(supports, name)(*cases.positional(name, arguments))

    yield ask
    monkeypatch.undo()
    forget()


def attention(name, d, T, sides):
    arguments = cases.make(B=1, J=1, T=T, d=d, N=3, H=1, D=8, dtype=torch.half).arguments(name)
    dropped = {0: ("key", "value"), 1: ("value",), 2: ()}[sides]
    for side in dropped:
        arguments |= {f"{side}_outputs": None, f"{side}_targets": None}
    return arguments if sides else {**arguments, "gates": None, "components": None, "index": None}


@pytest.mark.parametrize("name", ("edited_attention", "fused_edited_attention"))
def test_the_longest_context_runs_and_the_next_is_refused(host, asked, name):
    found = set()
    for d, shared, sides in itertools.product(cases.WIDTHS, SHARED_MEMORY, (0, 2) if name == "edited_attention" else (2,)):
        asked(name, attention(name, d, 1, sides), shared)  # loads the library
        longest = library.ask(f"{name}_longest", shared, d, sides, *[0] * (name == "edited_attention"))
        host.configure(0, shared)
        for T in {longest, longest + 1} - {0}:
            arguments = attention(name, d, T, sides)
            fits = T == longest
            assert (asked(name, arguments, shared) is None) == fits, (d, T, shared)
            if fits:
                assert torch.isfinite(getattr(host, name)(**arguments)).all()
            else:
                with pytest.raises(Refused, match="shared memory|T must be at most") as refused:
                    getattr(host, name)(**arguments)
                assert refused.value.status == 2
        found.add(longest)
    assert {0, 256} < found


def test_what_else_is_asked(asked):
    case = cases.make(J=1, B=1, D=4, T=3)
    assert asked("concept_gates", case.arguments("concept_gates"), 0) is None
    assert library.ask("concept_gates_most") == 32768
    assert supports.compiled_widths("edited_attention") == supports.compiled_widths("fused_edited_attention") == cases.WIDTHS
    many = {**case.arguments("concept_gates"), "index": case.index.expand(1, 32769)}
    assert asked("concept_gates", many, 0) == "it takes J up to 32768; got 32769"


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *((name, dict(D=D)) for name in ("edited_projection", "fused_edited_attention") for D in (1, 9)),
        *((name, dict(dtype=dtype)) for name in ("edited_projection", "fused_edited_attention", "edited_attention") for dtype in cases.FLOATING[1:]),
        *(("concept_gates", dict(dtype=dtype)) for dtype in cases.FLOATING[1:]),
    ],
)
def test_python_supports_what_the_function_takes(host, asked, name, sizes):
    arguments = cases.make(**{"B": 2, "T": 5, "D": 8, "d": 32, "N": 3, "H": 1, "dtype": torch.half, **sizes}).arguments(name)
    reason = asked(name, arguments, SHARED_MEMORY[-1])
    if reason is None:
        getattr(host, name)(**arguments)
    else:
        with pytest.raises(Refused):
            getattr(host, name)(**arguments)


@pytest.mark.parametrize(
    ("operator", "sizes", "longer"),  # the greatest sizes that fit; the size with which one more does not
    [
        ("concept_gates", dict(B=2**15, T=2**19, J=1), "T"),
        ("edited_projection", dict(B=2**10, T=2**20, D=8, O=79 * 128), "O"),
        ("edited_projection_backward", dict(B=2**14, T=2**15, D=8, O=8), "T"),
        ("edited_projection_backward", dict(B=2**14, T=2**15, D=2**12, O=8), "D"),
        ("edited_projection_backward", dict(B=1, T=1, D=8, O=2**22, S=2**15), "O"),
    ],
)
def test_the_limit_of_a_launch_is_where_its_message_says(host, operator, sizes, longer):
    """The formula in the message, with the sizes, gives the number in it. Nothing is allocated or launched."""

    def ask(sizes):
        call = params(operator, {}, **sizes)
        if operator == "edited_projection":
            planned = host.module.plan_edited_projection(ctypes.addressof(call))
            return planned["status"], planned["message"]
        try:
            host.api(f"{operator}_workspace", call, ctypes.byref(ctypes.c_int64()))
        except Refused as refused:
            return refused.status, str(refused)
        return 0, ""

    assert ask(sizes) == (0, "")
    more = sizes | {longer: sizes[longer] + 1}
    status, message = ask(more)
    formula, most, got = re.fullmatch(rf"{operator}(?:_workspace)?: (.+) must be at most (\d+); got (\d+)", message).groups()

    def computed(sizes):
        return eval(formula, {"ceil": math.ceil}, sizes)

    assert status == 2 and computed(sizes) <= int(most) < computed(more) == int(got), message
