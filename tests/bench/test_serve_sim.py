"""bench/serve_sim.py: its events are those of a step by step count, its caches those of real ones, and it says what it stands on."""

import dataclasses
import math
from collections import OrderedDict

import numpy as np
import pytest
from PIL import Image

from bench import rows, serve_sim
from bench.report import tables

pytestmark = pytest.mark.bench

FLAT = serve_sim.Machine("flat", "passed", {rows: 1.0 for rows in (2, 64)}, 0.0, 0.0, 0.0, 0.0, 1000)  # a batch costs what one row costs
A = serve_sim.Assumptions(concepts=1000, least_pictures=600, pictures=100, shortest_run=4, longest_run=12)


def machine():
    return serve_sim.measured(rows.read(serve_sim.RESULTS / "serving.jsonl"))


def step_by_step(machine, a, arrivals, steps, batch):
    """When each picture is finished by one replica of `mixed`, counted step after step."""
    waiting, running, finished, now = list(range(len(arrivals))), {}, {}, 0.0
    while waiting or running:
        while waiting and len(running) < batch and arrivals[waiting[0]] <= now + 1e-9:
            picture = waiting.pop(0)
            running[picture] = steps[picture]
        if not running:
            now = arrivals[waiting[0]]
            continue
        now += machine.step(len(running) * a.rows_per_image)
        for picture in [picture for picture in running if running[picture] == 1]:
            del running[picture]
            finished[picture] = now
        running = {picture: left - 1 for picture, left in running.items()}
    return [finished[picture] for picture in range(len(arrivals))]


@pytest.mark.parametrize("load", (0.4, 0.9))
def test_events_are_those_of_a_count_step_by_step(load):
    """Stretches of many steps in one event, broken by who joins, end when single steps would."""
    plain = dataclasses.replace(machine(), text=0.0, decoding=0.0, adoption=0.0, from_file=0.0)
    a = dataclasses.replace(A, batch=4)
    rate, shares = load * serve_sim.capacity(plain, a), serve_sim.popularity(a)
    fleet = serve_sim.Fleet(plain, a, "mixed", 1, rate, shares)
    fleet.run()
    random = np.random.default_rng(a.seed)
    arrivals = np.cumsum(random.exponential(1 / rate, 600))
    random.random(600)
    steps = random.integers(a.shortest_run, a.longest_run + 1, 600)
    expected = step_by_step(plain, a, arrivals, steps, a.batch)
    alone = {float(arrival): int(count) * plain.step(2) for arrival, count in zip(arrivals, steps)}
    found = {arrival: arrival + late * alone[arrival] for arrival, late in fleet.served}
    assert [found[float(arrival)] for arrival in arrivals] == pytest.approx(expected, rel=1e-6)


def test_every_picture_is_drawn_once_and_the_same_seed_gives_the_same_rows():
    for policy in serve_sim.POLICIES:
        fleet = serve_sim.Fleet(machine(), A, policy, 5, 3 * serve_sim.capacity(machine(), A), serve_sim.popularity(A))
        first = fleet.run()
        assert len(fleet.served) == len({arrival for arrival, _ in fleet.served}) == first["pictures"] == 600
        assert min(late for _, late in fleet.served) >= 1 - 1e-9
        assert all(not (replica.running or replica.backlog or replica.coming or replica.waiting) for replica in fleet.replicas)
        assert serve_sim.simulate(machine(), A, policy, 5, 0.6) == serve_sim.simulate(machine(), A, policy, 5, 0.6)
    assert serve_sim.simulate(machine(), A, "mixed", 5, 0.6) != serve_sim.simulate(machine(), dataclasses.replace(A, seed=1), "mixed", 5, 0.6)


def test_splitting_costs_nothing_where_there_is_one_concept_and_a_batch_where_all_differ():
    """Both ends are known: with one concept the policies are one; with none alike, a forward of `split` has one picture."""
    one = dataclasses.replace(A, concepts=1)
    mixed, split = (serve_sim.simulate(FLAT, one, policy, 1, 0.8) for policy in serve_sim.POLICIES)
    assert split["device_seconds"] == pytest.approx(mixed["device_seconds"], rel=0.02)
    assert split["p95"] == pytest.approx(mixed["p95"], rel=0.1)
    many = dataclasses.replace(A, concepts=1_000_000, zipf=0.0)
    alone = serve_sim.simulate(FLAT, many, "split", 1, 0.8)
    assert alone["fill"] == pytest.approx(1, abs=0.01) and alone["device_seconds"] == pytest.approx(8, rel=0.05)  # 4 to 12 steps of 1 s
    full = serve_sim.simulate(FLAT, many, "mixed", 1, 0.97)
    assert full["fill"] > 12 and alone["device_seconds"] / full["device_seconds"] > 12  # of 16


@pytest.mark.parametrize("places", (30, 200))
def test_misses_are_those_of_a_cache_by_least_recent_use(places):
    a = dataclasses.replace(A, concepts=2000, bank_bytes=1000.0 * places, host_bytes=1e9, least_pictures=20_000)
    found = serve_sim.simulate(FLAT, a, "mixed", 1, 0.5)
    shares, random, cache, missed = serve_sim.popularity(a), np.random.default_rng(5), OrderedDict(), 0
    for number, concept in enumerate(random.choice(2000, 40_000, p=shares)):
        missed += number >= 20_000 and concept not in cache
        cache[concept] = None
        cache.move_to_end(concept)
        if len(cache) > places:
            cache.popitem(last=False)
    assert found["bank_misses"] == pytest.approx(missed / 20_000, abs=0.015) and found["host_misses"] == 0


def test_the_characteristic_time_keeps_as_many_as_there_are_places():
    rates = serve_sim.popularity(A) * 7.0
    for homes in (1, 2, 8):
        time = serve_sim.characteristic_time(rates, 50, replicas=8, homes=homes)
        assert homes / 8 * -np.expm1(-rates * time / homes).sum() == pytest.approx(50)
    assert serve_sim.characteristic_time(rates, 1000, replicas=8, homes=8) == math.inf


def test_steps_between_measured_rows_are_interpolated():
    steps = dict(machine().steps)
    assert machine().step(2) == steps[2]
    assert machine().step(12) == pytest.approx((steps[8] + steps[16]) / 2)
    assert machine().step(128) == pytest.approx(steps[64] + 2 * (steps[64] - steps[32]))
    with pytest.raises(ValueError, match="no measured steps"):
        serve_sim.measured([])


def test_rows_hold_what_they_stand_on_and_the_plot_is_of_them(tmp_path):
    found = rows.read(serve_sim.RESULTS / "serve_sim.jsonl")
    names = {field.name for field in dataclasses.fields(serve_sim.Assumptions)}
    assert all(row["gate"] == "simulated" and row["assumptions"].keys() == names for row in found)
    assert {row["steps"] for row in found} == {"measured", "predicted"} and {1, 1000} <= {row["replicas"] for row in found}
    assert {row["assumptions"]["concepts"] for row in found} == {1_000_000}
    assert Image.open(serve_sim.PLOT).text["rows"] == serve_sim.digest(found), f"python bench/serve_sim.py --plot {serve_sim.PLOT}"
    text = tables(found, "split")
    assert text.count("step times that are") == 3 and "| 1,000 | 0.95 |" in text and "LoRA" in text
    one = next(row for row in found if row["case"] == "toybox, 1 replicas, load 0.5" and row["provider"] == "mixed")
    again = serve_sim.simulate(machine(), serve_sim.Assumptions(), "mixed", 1, 0.5)
    assert one["p95"] == pytest.approx(again["p95"], rel=1e-3) and one["device_seconds"] == pytest.approx(again["device_seconds"], rel=1e-3)
