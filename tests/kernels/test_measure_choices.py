"""`measure_choices`: who is right and faster is taken, by a clear margin, and nobody who is wrong; really timed, and with a clock of our own."""

import contextlib
import dataclasses
import json
import sys
import types

import pytest
import torch

from perfusion_kernels import absorb_where_faster, backend, choices, contest, measure_choices

MODULE = sys.modules["perfusion_kernels.measure_choices"]  # the package's attribute is the function
SIZES = dict(device="cpu", dtype=torch.float32, rows=2, tokens=7, text_width=6)
LAYERS = [(5, 12, 2, 4), (3, 9, 1, 8), (5, 12, 2, 4)]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PERFUSION_CACHE", str(tmp_path))
    monkeypatch.setattr(choices, "SHIPPED", tmp_path / "shipped.json")
    choices.known.cache_clear()
    choices._table.cache_clear()
    yield tmp_path
    choices.known.cache_clear()
    choices._table.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """clock(plain=2, absorbed=1): a measure that says so of layers, after it made the call."""
    ran = []
    layer = MODULE.cross_attention_layer

    def recorded(hidden_states, query_weight, *rest, **options):
        ran.append("absorbed" if query_weight is None else "plain")
        return layer(hidden_states, query_weight, *rest, **options)

    monkeypatch.setattr(MODULE, "cross_attention_layer", recorded)

    def make(**times):
        return lambda call: call() is not None and times[ran[-1]]

    return make


def test_both_forms_of_a_layer_are_really_timed():
    """Absorption leaves a fourteenth of the multiplications to one wide head, and gives sixteen narrow ones six times as many."""
    worth, not_worth = (128, 1024, 1, 1024), (128, 128, 16, 8)
    found = measure_choices([worth, not_worth], device="cpu", dtype=torch.float32, rows=2, tokens=77, text_width=8)
    by_width = {row.sizes["C"]: row for row in found.choices}
    assert (by_width[1024].choice, by_width[128].choice) == ("absorbed", "plain")
    assert 0 < by_width[1024].ratio < 0.97 < by_width[128].ratio and {row.against for row in found.choices} == {"plain"}
    assert all(row.rounds >= 15 and row.torch == torch.__version__ and row.device == "cpu" and row.date for row in found.choices)
    for (_, C, H, d), absorbed in ((worth, True), (not_worth, False)):
        weights = torch.zeros(H * d, C), torch.zeros(2, 77, H, d), torch.zeros(2, 77, H, d), torch.zeros(C, H * d)
        assert (absorb_where_faster(*weights, image_tokens=128)["query_weight"] is None) == absorbed


@pytest.mark.parametrize(("time", "taken"), [(0.5, "absorbed"), (0.96, "absorbed"), (0.98, "plain"), (1.0, "plain"), (2.0, "plain")])
def test_a_win_needs_a_margin(clock, cache, time, taken):
    found = measure_choices(LAYERS, **SIZES, measure=clock(absorbed=time, plain=1.0)).choices
    assert [(row.choice, row.ratio, tuple(row.sizes.values())) for row in found] == [
        (taken, time, (2, 5, 12, 7, 2, 4)), (taken, time, (2, 3, 9, 7, 1, 8)),
    ]  # fmt: skip
    (file,) = cache.iterdir()
    assert json.loads(file.read_text()) == [dataclasses.asdict(row) for row in found]
    assert choices.measured("cross_attention_layer", CPU, torch.float32, (2, 3, 9, 7, 1, 8)) == taken


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (lambda key, value: (key, 1.01 * value), "absorbed gave a wrong result: error "),
        (lambda key, value: (key, value.clone().index_fill_(0, torch.tensor(1), torch.nan)), "absorbed gave a wrong result: error nan"),
        (lambda key, value: (key, value[:, 1:]), "absorbed failed: ValueError: cross_attention_layer: value must have shape"),
    ],
)
def test_who_is_wrong_is_never_taken(clock, monkeypatch, fault, why):
    """Nor is it where an earlier row says so."""
    measure = clock(absorbed=0.1, plain=1.0)
    assert measure_choices(LAYERS[:1], **SIZES, measure=measure).choices[0].choice == "absorbed"
    absorb = MODULE.absorb_projections
    monkeypatch.setattr(MODULE, "absorb_projections", lambda *tensors: fault(*absorb(*tensors)))
    (row,) = measure_choices(LAYERS[:1], **SIZES, measure=measure).choices
    assert (row.choice, row.ratio) == ("plain", None) and row.why.startswith(why)
    assert choices.measured("cross_attention_layer", CPU, torch.float32, tuple(row.sizes.values())) == "plain"


def test_without_anybody_to_compare_with_there_is_no_row(clock, monkeypatch):
    monkeypatch.setattr(contest, "FACTOR", -1e9)  # everybody is wrong
    found = measure_choices(LAYERS[:1], **SIZES, measure=clock(absorbed=0.1, plain=1.0))
    assert found.choices == () and "plain gave a wrong result" in found.reasons[-1]


def test_a_backend_that_is_not_there_is_no_contestant_and_says_why(clock, monkeypatch):
    monkeypatch.setitem(backend._absent, "cuda", "not compiled: there was no nvcc")
    monkeypatch.setitem(backend._implementations, "edited_projection", {"reference": backend._implementations["edited_projection"]["reference"]})
    found = measure_choices(LAYERS, **SIZES, measure=clock(absorbed=1, plain=1))
    assert found.reasons == (
        "edited_projection: backend 'cuda' was asked for but cannot run this call: not compiled: there was no nvcc. Can run it: reference",
    )
    assert {row.operator for row in found.choices} == {"cross_attention_layer"}


def test_files_that_are_passed_over_are_named(clock):
    choices.users("cpu").write_text("{")
    assert f"{choices.users('cpu')} is passed over: " in measure_choices(LAYERS, **SIZES, measure=clock(absorbed=1, plain=1)).reasons[0]


@pytest.fixture
def compiled(monkeypatch):
    """As if the compiled product were here: the reference computes in its place. compiled(cuda=1, library=2, baddbmm=3): a measure."""
    ran = []
    project, alone = MODULE.edited_projection, MODULE._by_the_library_alone

    def projected(*arguments, backend, **options):
        ran.append({"cuda": "cuda", "auto": "library"}[backend])
        return project(*arguments, backend="reference", **options)

    monkeypatch.setattr(MODULE, "select", lambda *arguments: None)
    monkeypatch.setattr(MODULE, "edited_projection", projected)
    monkeypatch.setattr(MODULE, "_by_the_library_alone", lambda *arguments: ran.append("baddbmm") or alone(*arguments))

    def make(**times):
        return lambda call: call() is not None and times.get(ran[-1], 1.0)

    return make


@pytest.mark.parametrize(
    ("times", "outcome"),
    [
        (dict(cuda=1.0, library=2.0, baddbmm=4.0), ("cuda", 0.5, "library")),
        (dict(cuda=1.0, library=4.0, baddbmm=2.0), ("cuda", 0.5, "baddbmm")),
        (dict(cuda=1.0, library=2.0, baddbmm=0.8), ("library", 1.25, "baddbmm")),
        (dict(cuda=1.0, library=0.8, baddbmm=2.0), ("library", 1.25, "library")),
        (dict(cuda=0.98, library=1.0, baddbmm=1.0), ("library", 0.98, "library")),
    ],
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_the_product_must_beat_both_ways_of_the_library(compiled, times, outcome, dtype):
    found = measure_choices(LAYERS, **{**SIZES, "dtype": dtype, "concepts": 2}, measure=compiled(**times)).choices[0]
    assert (found.choice, found.ratio, found.against) == outcome
    assert (found.operator, found.sizes) == ("edited_projection", {"B": 2, "T": 7, "D": 6, "O": 24})
    assert choices.measured("edited_projection", CPU, dtype, (2, 7, 6, 24)) == outcome[0]


def test_a_product_that_is_wrong_is_never_taken(compiled, monkeypatch):
    project = MODULE.edited_projection
    monkeypatch.setattr(MODULE, "edited_projection", lambda *tensors, **options: project(*tensors, **options) * (1 + 0.01 * (options["backend"] == "cuda")))
    row = measure_choices(LAYERS, **SIZES, measure=compiled(cuda=0.1)).choices[0]
    assert (row.operator, row.choice, row.ratio) == ("edited_projection", "library", None) and row.why.startswith("cuda gave a wrong result: ")


def test_nobody_elses_random_numbers_are_drawn(clock):
    before = torch.get_rng_state()
    measure_choices(LAYERS, **SIZES, measure=clock(absorbed=1, plain=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_layers():
    with pytest.raises(ValueError, match="measure_choices: layers must name at least one layer; got none"):
        measure_choices([], **SIZES)


def test_a_device_without_a_clock():
    with pytest.raises(ValueError, match="measure_choices: device must be cpu or cuda or xpu, whose time can be measured; got meta"):
        measure_choices(LAYERS, **{**SIZES, "device": "meta"})


# the contest itself


def test_contestants_take_turns_and_the_median_of_the_rounds_counts(monkeypatch):
    """A slow moment that touches a whole round, or one call of few, changes nothing."""
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in ("new", "old")}
    monkeypatch.setattr(contest, "SECONDS", 0)

    def measure(call):
        call()
        slow = 50 if (len(calls) - 3) // 2 in (2, 5) or len(calls) in (9, 17) else 1
        return slow * {"new": 3, "old": 4}[calls[-1]]

    assert contest.ratios("new", contestants, CPU, measure) == ({"old": 0.75}, contest.ROUNDS[0])
    pairs = ["".join(calls[start : start + 2]) for start in range(2, len(calls), 2)]
    assert set(pairs) == {"newold", "oldnew"} and len(pairs) == contest.ROUNDS[0]


def test_a_small_row_is_compared_by_its_own_size():
    exact = torch.tensor([[1.0, -2.0], [1e-3, 2e-3]], dtype=torch.float64)
    plain = exact.float()
    wrong = plain.clone()
    wrong[1, 0] += 1e-7
    right, reasons = contest.admit({"right": lambda: plain, "wrong": lambda: wrong}, plain, exact)
    assert list(right) == ["right"] and reasons["wrong"].startswith("gave a wrong result: error 1e-07")


def test_a_sample_on_a_gpu_is_one_call_between_events_behind_a_full_cache(monkeypatch):
    """With a device of our own, which writes down what it is asked for."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("event")

        def synchronize(self):
            asked.append("wait")

        def elapsed_time(self, end):
            return 7.0 if end is not self else 0.0

    buffer = types.SimpleNamespace(fill_=lambda value: asked.append("flush"))
    api = types.SimpleNamespace(Event=Event, device=lambda device: contextlib.nullcontext(asked.append(device)))
    mine = types.SimpleNamespace(xpu=api, uint8=torch.uint8, empty=lambda size, **options: buffer if size == 2**28 else None)
    monkeypatch.setattr(contest, "torch", mine)
    device = torch.device("xpu", 1)
    assert contest._on_gpu(device)(lambda: asked.append("call")) == 7.0
    assert asked == [device, "flush", "event", "call", "event", "wait"]


def test_a_sample_of_a_short_call_is_many_calls():
    calls = []
    assert contest._on_host(lambda: calls.append(1)) < contest.SHORTEST / 10 and len(calls) > 10
