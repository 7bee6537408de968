"""`edited_attention` with slots and regions, and `concept_gates` by places, on every backend, against formulas written plainly."""

import contextlib
import re
from dataclasses import replace

import pytest
import torch

from perfusion_kernels import BackendUnavailable, check_device, concept_gates, edited_attention, use_backend
from perfusion_kernels.schemas import SCHEMAS

from . import cases, cuda_on_host, plain
from .test_floor import gradients
from .tolerance import assert_close, assert_no_worse, exactly

pytestmark = pytest.mark.numeric

NOT_YET = ()
# None is what a call gets that names no backend
RUNS = {
    name: [(None, "cpu"), *(run for run in cases.runs(name) if run[0] not in NOT_YET)] for name in ("concept_gates", "edited_attention")
}
WHERE = ("slots", "query_regions", "key_regions")


def extended(rows: int = 4, N: int = 17, **options) -> tuple[cases.Case, dict]:
    """A case of 4 rows of keys and values, and arguments of `rows` rows that read them in some order.

    The first row's tokens see all positions, those of the second what their bits allow, and two tokens of the third nothing.
    """
    case = cases.make(B=4, N=N, J=3, **options)
    arguments = case.arguments("edited_attention")
    generator = torch.Generator().manual_seed(1)
    T, device = case.key.shape[1], case.query.device

    def bits(*shape: int) -> torch.Tensor:
        return torch.randint(0, 4, shape, generator=generator, dtype=torch.int32)

    slots = (torch.arange(rows, dtype=torch.int32) * 3 + 1) % 4
    query_regions, key_regions = bits(rows, N), bits(rows, T)
    key_regions[0] = 0
    if rows > 2:
        key_regions[2], query_regions[2] = -(1 << 31), -1  # the sign is a bit as any other
        query_regions[2, :2] = 3
    query = case.query[torch.arange(rows, device=device) % 4]
    where = dict(zip(WHERE, (x.to(device) for x in (slots, query_regions, key_regions))))
    return case, {**arguments, "query": query.contiguous(), **where}


def agrees(arguments: dict, backend: str | None) -> torch.Tensor:
    """The public function beside the plain formula in the same dtype, both against float64."""
    result = edited_attention(**arguments, scale=0.3, backend=backend)
    exact = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in arguments.items()}
    same = plain.edited_attention(*cases.positional("edited_attention", arguments))
    (truth,) = exactly(plain.edited_attention, *cases.positional("edited_attention", exact))
    index = arguments["index"] if arguments.get("slots") is None else arguments["index"][arguments["slots"].long()]
    assert_no_worse(result, same, truth, index)
    assert result.is_contiguous()
    return result


@pytest.mark.parametrize("backend, device", RUNS["edited_attention"])
@pytest.mark.parametrize(
    "T, d, absent", ((13, 8, ()), (13, 8, ("slots",)), (13, 8, ("query_regions", "key_regions")), (77, 40, ()), (100, 64, ("slots",)))
)
def test_slots_and_regions(backend, device, absent, T, d):
    case, arguments = extended(T=T, d=d, device=device, backend=backend)
    result = agrees({**arguments, **dict.fromkeys(absent)}, backend)
    if not absent:
        assert not result[2, :2].any() and result[2, 2:].any()  # nothing is left to these two
    if "query_regions" in absent:
        rows = {n: arguments[n][arguments["slots"].long()] for n in ("key", "value", "gates", "components", "index")}
        unslotted = {**arguments, **dict.fromkeys(WHERE), **rows}
        assert torch.equal(result, edited_attention(**unslotted, scale=0.3, backend=backend))


@pytest.mark.parametrize("backend, device", RUNS["edited_attention"])
@pytest.mark.parametrize("rows", (1, 6))
def test_more_and_fewer_rows_than_slots(backend, device, rows):
    case, arguments = extended(rows, device=device, backend=backend)
    edit = dict.fromkeys(n for n in arguments if n not in ("query", "key", "value", *WHERE))
    result = edited_attention(**{**arguments, **edit}, scale=0.3, backend=backend)
    double = {n: x.double() if x.is_floating_point() else x for n, x in arguments.items() if n not in edit}
    (truth,) = exactly(lambda: edited_attention(**double, scale=0.3, backend="reference"))
    same = edited_attention(**{**arguments, **edit}, scale=0.3, backend="reference")
    assert_no_worse(result, same, truth, arguments["index"][:0].new_empty((rows, 0)))


@pytest.mark.parametrize("backend, device", RUNS["edited_attention"])
def test_a_slot_out_of_range_reads_nothing(backend, device):
    case, arguments = extended(device=device, backend=backend)
    arguments["slots"] = arguments["slots"].clone()
    expected = edited_attention(**arguments, backend=backend)
    for bad in (-1, 4, 2**31 - 1, -(2**31)):
        arguments["slots"][1] = bad
        with pytest.raises(ValueError, match=re.escape("slots must lie in 0 … 3 (P = 4 rows of key and value)")):
            edited_attention(**arguments, backend=backend, validate=True)
        result = edited_attention(**arguments, backend=backend, validate=False)
        assert not result[1].any()
        rest = [0, 2, 3]
        assert torch.equal(result[rest], expected[rest])


@pytest.mark.parametrize("backend, device", RUNS["edited_attention"])
@pytest.mark.parametrize("bad", (5, 2**31 - 1, -7))
def test_an_index_out_of_range_is_absent(backend, device, bad):
    case = cases.make(J=2, S=5, device=device, backend=backend)
    arguments = case.arguments("edited_attention")
    index = arguments["index"].clone()
    index[1, 0], arguments["index"] = bad, index
    result = edited_attention(**arguments, backend=backend, validate=False)
    index = index.clone()
    index[1, 0] = -1
    assert torch.equal(result, edited_attention(**{**arguments, "index": index}, backend=backend))


KERNELS = [
    (operator, *run)
    for operator in SCHEMAS
    for run in cases.runs(operator)
    if run[0] != "reference" and run[0] not in NOT_YET and " index" in SCHEMAS[operator]
]


def forget(device):
    """What other tests have met."""
    with contextlib.suppress(RuntimeError):
        check_device(device)


@pytest.mark.parametrize("operator, backend, device", KERNELS)
def test_a_device_reports_an_index_out_of_range(operator, backend, device):
    """Every kernel that looks something up: nothing is read, other rows keep their bits, and the device remembers."""
    arguments = cases.make(J=2, S=5, device=device, backend=backend).arguments(operator)
    arguments["index"] = arguments["index"].clone()
    expected = cases.PUBLIC[operator](**arguments, backend=backend)
    forget(device)
    for bad in (5, -2):
        arguments["index"][1] = bad
        result = cases.PUBLIC[operator](**arguments, backend=backend, validate=False)
        for mine, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (result, expected))):
            assert torch.equal(mine[2:], other[2:]) and mine[1].isfinite().all()
        with pytest.raises(RuntimeError, match="^kernels on .* out of range: index: a row named a concept outside of the bank"):
            check_device(device)
        check_device(device)  # said once


@pytest.mark.parametrize("operator, backend, device", KERNELS)
def test_gradients_of_an_index_out_of_range(operator, backend, device):
    """Those of an absent place."""
    case = cases.make(J=2, S=5, T=5, D=6, H=1, N=3, device=device, backend=backend)
    found = []
    for slot in (5, -2, -1):
        index = case.index.clone()
        index[1, 0] = slot
        found.append(gradients(operator, replace(case, index=index), backend))
    forget(device)
    assert all(map(torch.equal, found[0], found[2])) and all(map(torch.equal, found[1], found[2]))


@pytest.mark.parametrize("backend, device", [run for run in RUNS["edited_attention"] if run[0] not in (None, "reference")])
def test_a_device_reports_a_slot_out_of_range(backend, device):
    case, arguments = extended(device=device, backend=backend)
    arguments["slots"][2] = 4
    forget(device)
    edited_attention(**arguments, backend=backend, validate=False)
    with pytest.raises(RuntimeError, match="out of range: slots: a row named a slot outside of key and value; it gave zeros. Call"):
        check_device(device)


def test_gradients_through_slots_and_regions():
    case, arguments = extended(rows=3, N=4, T=5, D=4, H=2, d=2, dtype=torch.float64)
    for name in ("gates", "components"):
        arguments[name] = arguments[name].nan_to_num()
    arguments["query_regions"], arguments["key_regions"] = arguments["query_regions"][:3], arguments["key_regions"][:3]
    names = ("query", "key", "value", "gates", "components", "value_outputs")
    leaves = [arguments[name].clone().requires_grad_() for name in names]

    def function(*tensors):
        return edited_attention(**{**arguments, **dict(zip(names, tensors))}, validate=False)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    key = arguments["key"].clone().requires_grad_()
    edited_attention(**{**arguments, "key": key}).sum().backward()
    unused = set(range(4)) - set(arguments["slots"].tolist())
    assert unused and not key.grad[list(unused)].any() and key.grad.any()


def test_refusals_of_slots_and_regions():
    case, arguments = extended()
    for changes, message in (
        (dict(key_regions=None), "key_regions must be given with query_regions; got None"),
        (dict(query_regions=None), "query_regions must be given with key_regions; got None"),
        (dict(slots=arguments["slots"][:3]), "slots must have shape [B] with B = 4 (from query); got [3]"),
        (dict(key_regions=arguments["key_regions"][:, 1:]), "key_regions must have shape [B, T]"),
        (dict(slots=None, query=arguments["query"][:3]), "key must have shape [B, T, H, d] with B = 3 (from query)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            edited_attention(**{**arguments, **changes})
    with pytest.raises(TypeError, match="slots must be int32; got int64"):
        edited_attention(**{**arguments, "slots": arguments["slots"].long()})


def test_a_call_without_a_backend_is_torch_s_on_a_cpu(monkeypatch):
    """And only then: named, differentiated, autocast and vmapped calls are the operator's."""
    from perfusion_kernels import sdpa

    calls = []
    monkeypatch.setattr(sdpa, "_attend", lambda *a, run=sdpa._attend: calls.append(1) or run(*a))
    case = cases.make()
    tensors = case.query, case.key, case.value
    edited_attention(*tensors)
    edited_attention(**case.arguments("edited_attention"))
    assert len(calls) == 2
    edited_attention(*tensors, backend="reference")
    with use_backend("reference"):
        edited_attention(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert edited_attention(*tensors).dtype == torch.bfloat16
    edited_attention(case.query.clone().requires_grad_(), *tensors[1:]).sum().backward()
    with pytest.raises(NotImplementedError, match="torch.vmap"):
        torch.vmap(lambda x: edited_attention(x, *tensors[1:]))(case.query[None])
    assert len(calls) == 2


@pytest.mark.parametrize(
    "argument, context, environment, runs",
    [
        *((None, None, None, "torch's"), (None, None, "auto", "torch's"), (None, "auto", "reference", "torch's")),
        ("auto", "reference", "reference", "torch's"),
        *((None, None, "reference", "it"), (None, "reference", None, "it"), ("reference", None, None, "it"), ("reference", "auto", "auto", "it")),
        *((None, None, "cuda", "refused"), (None, "cuda", None, "refused"), ("cuda", None, None, "refused"), (None, None, "no", "refused")),
    ],
)
@pytest.mark.skipif(cuda_on_host.registered(), reason="the compiled kernels take host tensors here")
def test_a_backend_asked_for_by_name_is_never_passed_over(monkeypatch, argument, context, environment, runs):
    """A call's argument goes before `use_backend`, and that before PERFUSION_BACKEND, with nothing to edit too."""
    from perfusion_kernels import backend, sdpa

    calls = []
    monkeypatch.setattr(sdpa, "_attend", lambda *a, run=sdpa._attend: calls.append(1) or run(*a))
    monkeypatch.setattr(backend, "_requested", environment)
    x = torch.ones(1, 2, 1, 4)
    with contextlib.nullcontext() if context is None else use_backend(context):
        for options in ({}, {"slots": torch.zeros(1, dtype=torch.int32)}):  # a short way through the public function, and the long one
            refusal = pytest.raises(BackendUnavailable, match="was asked for") if runs == "refused" else contextlib.nullcontext()
            with refusal:
                edited_attention(x, x, x, backend=argument, **options)
    assert len(calls) == (2 if runs == "torch's" else 0)


def by_word(device="cpu", backend=None, P=2, **options):
    """Places of which some coincide with another concept's, and some are none."""
    case = cases.make(B=6, J=3, device=device, backend=backend or "reference", **options)
    (B, J), T = case.index.shape, case.encodings.shape[1]
    generator = torch.Generator().manual_seed(2)
    places = torch.randint(-1, T, (B, J, P), generator=generator, dtype=torch.int32)
    places[1, 1, 0] = places[1, 0, 0] = 4  # two concepts at one place: both keep their floor
    floor = torch.rand(B, J, generator=generator).to(case.bias.dtype)
    places[case.index.cpu() < 0], floor[case.index.cpu() < 0] = 10**6, float("nan")
    return case, {**case.arguments("concept_gates"), "places": places.to(device), "floor": floor.to(device)}


@pytest.mark.parametrize("backend, device", RUNS["concept_gates"])
@pytest.mark.parametrize("floor", (True, False))
@pytest.mark.parametrize("J", (3, 9))
def test_gates_by_word(backend, device, floor, J):
    case, arguments = by_word(device, backend)
    if J == 9:
        more = {n: torch.cat([arguments[n], *[arguments[n][:, :1]] * 6], 1) for n in ("index", "bias", "temperature", "places", "floor")}
        more["index"][:, 3:] = -1
        arguments |= more
    if not floor:
        arguments["floor"] = None
    gates, components = concept_gates(**arguments, backend=backend)
    exact = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in arguments.items()}
    same = plain.concept_gates(*cases.positional("concept_gates", arguments))
    truth = exactly(plain.concept_gates, *cases.positional("concept_gates", exact))
    assert_no_worse(gates, same[0], truth[0], arguments["index"])
    published = concept_gates(**{**arguments, "places": None, "floor": None}, backend=backend)
    assert torch.equal(components, published[1]) and not torch.equal(gates, published[0])
    elsewhere = torch.ones_like(gates, dtype=torch.bool)
    for b in range(gates.shape[0]):
        used = arguments["places"][b][arguments["index"][b] >= 0]
        elsewhere[b, used[used >= 0].long()] = False
    assert torch.equal(gates[elsewhere], published[0][elsewhere])


@pytest.mark.parametrize("backend, device", RUNS["concept_gates"])
def test_one_place_per_concept_needs_no_third_dimension(backend, device):
    case, arguments = by_word(device, backend, P=1)
    for mine, other in zip(
        concept_gates(**{**arguments, "places": arguments["places"][..., 0]}, backend=backend), concept_gates(**arguments, backend=backend)
    ):
        assert torch.equal(mine, other)


def test_gradients_of_gates_by_word():
    case, arguments = by_word(T=4, D=5, dtype=torch.float64)
    names = ("encodings", "targets", "metric_targets", "bias", "temperature", "floor")
    leaves = [arguments[name].nan_to_num(0.5).requires_grad_() for name in names]

    def function(*tensors):
        return concept_gates(**{**arguments, **dict(zip(names, tensors))}, validate=False)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    gates = function(*leaves)[0]
    assert torch.autograd.grad(gates.sum(), leaves[-1])[0].any()


@pytest.mark.parametrize("backend", sorted({backend for backend, device in RUNS["concept_gates"] if backend}))
def test_gates_by_word_are_differentiated_on_every_backend(backend):
    """By plain torch, where a backend's own derivatives do not know places."""
    case, arguments = by_word(backend=backend)
    wide = {name: x.double() if x is not None and x.is_floating_point() else x for name, x in arguments.items()}

    def gradient(arguments, backend):
        leaf = arguments["encodings"].detach().requires_grad_()
        concept_gates(**{**arguments, "encodings": leaf}, backend=backend)[0].sum().backward()
        return leaf.grad

    single = {**arguments, "encodings": arguments["encodings"].float()}
    assert_close(gradient(single, backend), *exactly(lambda: gradient(wide, "reference")))


def test_refusals_of_places():
    case, arguments = by_word()
    T = case.encodings.shape[1]
    for changes, message in (
        (dict(places=None), "floor must be given with places, at which it holds; got places None"),
        (dict(places=arguments["places"] + T), f"places must lie in -1 … {T - 1} (T = {T}); got values from"),
        (dict(floor=arguments["floor"] + 1), "floor must lie in 0 … 1; got 1."),
        (dict(places=arguments["places"][:, :2]), "places must have shape [B, J, P]"),
        (dict(places=arguments["places"][0]), "places must have shape [B, J]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            concept_gates(**{**arguments, **changes})
    with pytest.raises(TypeError, match="floor must be float32 .as bias.; got float64"):
        concept_gates(**{**arguments, "floor": arguments["floor"].double()})
