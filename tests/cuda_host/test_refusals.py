"""What the backend says its kernels take is what the C functions take: the same answer for every head width, context and device."""

import itertools

import pytest
import torch

from perfusion_kernels.cuda import library, refusals

from ..kernels import cases
from .host import Refused

DEVICES = ((108, 166912), (84, 101376), (132, 232448), (84, 90112), (2, 49152))  # multiprocessors, bytes of shared memory a block
PLANS = {"edited_attention": "plan", "fused_edited_attention": "fused_plan"}


@pytest.fixture
def on_host(monkeypatch):
    """The refusals, asked about tensors in host memory of a device of these limits."""

    def ask(name, limits, arguments):
        monkeypatch.setattr(library, "limits", lambda device: limits)
        return getattr(refusals, name)(*cases.positional(name, arguments))

    return ask


@pytest.mark.parametrize("name", PLANS)
def test_shared_memory(host, on_host, name):
    seen = set()
    for d, T, N, (multiprocessors, shared) in itertools.product(refusals.WIDTHS, (77, 81, 154, 231, 256), (17, 4000), DEVICES):
        arguments = shapes(name, T=T, d=d, N=N)
        host.configure(multiprocessors, shared)
        plan = getattr(host, PLANS[name])(**arguments)
        refused = on_host(name, (multiprocessors, shared), arguments)
        assert (refused is None) is (plan["status"] == 0), (d, T, N, shared, refused, plan["message"])
        if refused:
            assert refused.split(" need ")[1].split()[0] in plan["message"]
        seen.add(refused is None)
    assert seen == {True, False}


def shapes(name, T=77, d=40, N=3, **sizes):
    """Arguments whose values nobody reads."""
    B, H, J, S, D = (sizes.get(letter, size) for letter, size in dict(B=2, H=2, J=2, S=3, D=8).items())
    dtype, O = sizes.get("dtype", torch.half), H * d
    half = lambda *shape: torch.empty(shape, dtype=dtype)  # noqa: E731
    gates = dict(gates=torch.empty(B, T, J), components=torch.empty(B, T, J), index=torch.full((B, J), -1, dtype=torch.int32))
    tables = {f"{side}_{table}": half(S, O) for side in ("key", "value") for table in ("outputs", "targets")}
    heads = dict(query=half(B, N, H, d), key=half(B, T, H, d), value=half(B, T, H, d))
    text = dict(encodings=half(B, T, D), key_weight=half(O, D), value_weight=half(O, D))
    projection = dict(weight=half(O, D), outputs=half(S, O), projected_targets=half(S, O))
    concepts = {key: torch.ones(S, D) for key in ("targets", "metric_targets")} | {key: torch.ones(B, J) for key in ("bias", "temperature")}
    everything = {**gates, **tables, **heads, **text, **projection, **concepts}
    return {argument.name: everything.get(argument.name) for argument in cases.overload_of(name)._schema.arguments if argument.name != "scale"}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *((name, dict(d=d)) for name in PLANS for d in (8, 32, 48, 160, 168)),
        *((name, dict(T=T)) for name in PLANS for T in (1, 256, 257)),
        *((name, dict(D=D)) for name in ("edited_projection", "fused_edited_attention") for D in (0, 1, 9)),
        *((name, dict(dtype=dtype)) for name in ("edited_projection", *PLANS) for dtype in (torch.bfloat16, torch.float32)),
        *(("concept_gates", dict(J=J, B=1, T=1)) for J in (0, 128, 129, 32769)),
    ],
)
def test_shapes_and_dtypes(host, on_host, name, sizes):
    arguments = shapes(name, **sizes)
    for key, x in arguments.items():
        if key not in ("index", "targets", "metric_targets"):
            x.zero_()
    try:
        getattr(host, name)(**arguments)
    except Refused as refused:
        assert on_host(name, (2, 232448), arguments), str(refused)
    else:
        assert on_host(name, (2, 232448), arguments) is None
