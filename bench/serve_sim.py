"""A fleet of servers, simulated: replicas that batch whatever comes against replicas that split batches by concept.

    python bench/serve_sim.py                                   # a table, of the step times in bench/results/serving.jsonl
    python bench/serve_sim.py --out bench/results/serve_sim.jsonl   # the same as rows, which the plot and the page read
    python bench/serve_sim.py --plot docs/serving.png     # drawn from those rows
    python bench/serve_sim.py --predicted sd15                  # step times of an H200 by bench/model.py instead: predicted ones
    python bench/serve_sim.py --replicas 64 --zipf 0.8 --loads 0.9      # other assumptions; --help lists them

Events are exact: a replica makes one step after another, pictures join and leave between two steps, a step takes as long as one of so many
rows was measured to take. Pictures arrive at random (Poisson), each with a concept drawn by Zipf's law. The replica is the shorter of two
queues. `mixed` takes waiting pictures in their order. `split` has one concept in a batch, others wait; it is given what a
good implementation would do: pictures of a concept are sent to the same two replicas while those keep up, join a running batch of
their concept, and changing the concept costs nothing unless `switch_seconds` says so.

Concepts lie in a shared store, in the memory of a host, and in the bank on the device, by least recent use. A replica serves
for too short a time here to fill them, so residence is that of the steady state, by Che's approximation: a concept is resident if its
last use was less than a characteristic time ago, before the beginning at random. Latencies are told over the time that the
same picture takes on an empty fleet.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import math
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

RESULTS, PLOT = ROOT / "bench" / "results", ROOT / "docs" / "serving.png"
POLICIES = ("mixed", "split")


@dataclass(frozen=True)
class Assumptions:
    """Seconds, bytes, pictures."""

    concepts: int = 1_000_000
    zipf: float = 1.0  # the k-th most wanted concept is asked for as often as k to the power of minus this
    pictures: int = 80  # that each replica is sent; the first fifth counts for nothing
    least_pictures: int = 4000  # of all replicas together
    shortest_run: int = 20  # steps of a picture, drawn evenly between these
    longest_run: int = 50
    rows_per_image: int = 2  # guidance
    batch: int = 16  # pictures of one forward at most
    choices: int = 2  # replicas whose queues are compared
    bank_bytes: float = 4e9  # of a device, for concepts
    host_bytes: float = 64e9  # of a host, for concepts
    store_seconds: float = 20e-3  # until the shared store has given a file
    switch_seconds: float = 0.0  # of the device, for another concept, in `split`
    predicted_text: float = 5e-3  # of an H200, beside the steps
    predicted_decoding: float = 1.5  # of an H200: a picture's, in steps of that picture alone
    goal: float = 4.0  # the 95th percentile that is asked for, over an empty fleet's
    seed: int = 0


@dataclass(frozen=True)
class Machine:
    """What a replica takes. steps: seconds by rows. text, from_file: beside the steps, for a picture and for a concept's file.
    decoding, adoption: of the device, for a picture and for a concept that comes into the bank."""

    name: str
    gate: str  # of the rows that it was read from: "passed" is measured
    steps: dict[int, float]
    text: float
    decoding: float
    from_file: float
    adoption: float
    concept_bytes: int

    def step(self, rows: int) -> float:
        """Linear between measured numbers of rows, and beyond the last two."""
        known = sorted(self.steps)
        if rows >= known[-1]:
            (a, b) = known[-2:]
            return self.steps[b] + (rows - b) * max(0.0, (self.steps[b] - self.steps[a]) / (b - a))
        return float(np.interp(rows, known, [self.steps[count] for count in known]))


def measured(rows: list[dict[str, Any]]) -> Machine:
    """From rows of the suite `serving` that passed; the last of each case counts."""
    found = {row["what"]: 1e-6 * row["median_us"] for row in rows if row["suite"] == "serving" and row["gate"] == "passed"}
    steps = {int(what.split()[2]): seconds for what, seconds in found.items() if what.startswith("a step, ")}
    if len(steps) < 2:
        raise ValueError("there are no measured steps: python bench/run.py --suite serving --out bench/results/serving.jsonl")
    shapes = rows[-1]["shapes"]
    return Machine(
        name=rows[-1]["case"].split(",")[0], gate="passed", steps=steps,
        text=found["text of a picture"], decoding=found["decoding of a picture"], adoption=found["a concept read before"],
        from_file=max(0.0, found["a concept from its file"] - found["a concept read before"]),
        concept_bytes=4 * (3 * shapes["D"] + 2 * shapes["O"]),
    )  # fmt: skip


def predicted(model: str, a: Assumptions) -> Machine:
    """Of one H200, by the assumptions of bench/model.py: nothing here was measured."""
    from bench import model as paper

    on_paper = paper.Assumptions()
    steps = {rows: paper.step_seconds(model, rows, on_paper, graph=True) for rows in (1, 2, 4, 8, 16, 32, 64)}
    return Machine(
        name=model, gate="predicted", steps=steps, text=a.predicted_text, decoding=a.predicted_decoding * steps[2],
        from_file=paper.miss_seconds(model, on_paper, on_disk=True), adoption=paper.miss_seconds(model, on_paper, on_disk=False),
        concept_bytes=paper.concept_bytes(model),
    )  # fmt: skip


def capacity(machine: Machine, a: Assumptions) -> float:
    """Pictures a second of a replica whose batch is always as full as is best for throughput, of concepts that are resident."""
    steps = (a.shortest_run + a.longest_run) / 2
    return max(n / (steps * machine.step(n * a.rows_per_image) + n * machine.decoding) for n in range(1, a.batch + 1))


def popularity(a: Assumptions) -> np.ndarray:
    """Each concept's share of the pictures, the most wanted first."""
    weights = np.arange(1, a.concepts + 1, dtype=np.float64) ** -a.zipf
    return weights / weights.sum()


def characteristic_time(rates: np.ndarray, places: float, *, replicas: int, homes: int) -> float:
    """T of Che's approximation for caches of `places` in each of `replicas`: Σ homes / replicas · (1 - exp(-rate T / homes)) = places.

    A concept is asked for at one of `rates` a second, of which each of its `homes` gets a part. Infinite if all fit.
    """
    share = homes / replicas
    if places >= share * len(rates):
        return math.inf

    def held(time: float) -> float:
        return share * float(-np.expm1(-rates * (time / homes)).sum())

    low, high = 0.0, 1.0
    while held(high) < places:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if held(middle) < places else (low, middle)
    return high


@dataclass(slots=True)
class Picture:
    """One request. left: steps that are to be made. adoption: seconds of the device for its concept, 0 if that is in the bank."""

    arrival: float
    concept: int
    left: int
    alone: float  # seconds on an empty fleet
    adoption: float = 0.0


@dataclass(slots=True)
class Replica:
    """What is waiting, by concept in `split` and all in one in `mixed`; what is drawn; and the stretch of steps that it is in.

    begin, seconds: when the stretch began, and of each of its steps.
    """

    waiting: dict[int, deque[Picture]] = dataclasses.field(default_factory=dict)
    running: list[Picture] = dataclasses.field(default_factory=list)
    coming: int = 0  # sent here, text and file not yet ready
    backlog: int = 0
    concept: int = -1  # of the batch, in `split`
    taken: int = 0  # pictures of it since it had its turn
    begin: float = 0.0
    seconds: float = 0.0
    plan: int = 0  # number of the only event that is still valid
    busy: float = 0.0
    rows: float = 0.0  # pictures times seconds

    def load(self) -> int:
        return len(self.running) + self.backlog + self.coming


class Fleet:
    """A simulation, to be run once. rate: pictures a second, for all replicas.

    `run` gives: percentiles of latency over that on an empty fleet; seconds of a device for a picture; pictures in a batch, in the
    mean of time; parts of pictures whose concept was not in the bank, and not in the host's memory; and the part that waits
    when the last arrives.
    """

    def __init__(self, machine: Machine, a: Assumptions, policy: str, replicas: int, rate: float, shares: np.ndarray):
        if policy not in POLICIES:
            raise ValueError(f"policy is one of {', '.join(POLICIES)}, got {policy!r}")
        self.machine, self.a, self.split = machine, a, policy == "split"
        self.replicas = [Replica() for _ in range(replicas)]
        self.rate, self.shares = rate, shares
        self.homes = min(replicas, a.choices) if self.split else replicas
        rates = shares * rate
        self.windows = [
            characteristic_time(rates, size / machine.concept_bytes, replicas=replicas, homes=self.homes)
            for size in (a.bank_bytes, a.host_bytes)
        ]
        self.step = [0.0, *(machine.step(n * a.rows_per_image) for n in range(1, a.batch + 1))]
        self.events: list[tuple[float, int, int, Any]] = []
        self.count = 0
        self.used: dict[tuple[int, int], float] = {}
        self.misses = [0, 0]
        self.served: list[tuple[float, float]] = []  # arrival, latency over that on an empty fleet
        self.random = np.random.default_rng(a.seed)

    def run(self) -> dict[str, float]:
        a, machine = self.a, self.machine
        total = max(a.least_pictures, a.pictures * len(self.replicas))
        arrivals = np.cumsum(self.random.exponential(1 / self.rate, total))
        concepts = np.searchsorted(np.cumsum(self.shares), self.random.random(total))
        steps = self.random.integers(a.shortest_run, a.longest_run + 1, total)
        pairs = self.random.integers(len(self.replicas), size=(total, a.choices))
        ages = self.random.exponential(1.0, total)  # of a concept's last use before the beginning, times its rate
        for number in range(total):
            time, concept = float(arrivals[number]), min(int(concepts[number]), a.concepts - 1)
            self._until(time)
            where = self._choose(concept, pairs[number])
            alone = machine.text + int(steps[number]) * self.step[1] + machine.decoding
            picture = Picture(time, concept, int(steps[number]), alone)
            wait = machine.text + self._fetch(where, picture, float(ages[number]))
            self.replicas[where].coming += 1
            self._push(time + wait, where, picture)
        waiting = sum(replica.backlog for replica in self.replicas)
        self._until(math.inf)
        return {**self._figures(float(arrivals[total // 5]), total), "waiting": waiting / total}

    def _figures(self, start: float, total: int) -> dict[str, float]:
        late = np.array([latency for arrival, latency in self.served if arrival >= start])
        p50, p95, p99 = np.percentile(late, (50, 95, 99))
        busy = sum(replica.busy for replica in self.replicas)
        return {
            "pictures": total, "p50": p50, "p95": p95, "p99": p99, "device_seconds": busy / total,
            "fill": sum(replica.rows for replica in self.replicas) / busy,
            "bank_misses": self.misses[0] / total, "host_misses": self.misses[1] / total,
        }  # fmt: skip

    def _push(self, time: float, where: int, what: Any) -> None:
        self.count += 1
        heapq.heappush(self.events, (time, self.count, where, what))

    def _until(self, time: float) -> None:
        """All events before `time`. One is a picture that is ready, or the (plan, steps) at whose end a replica looks again."""
        while self.events and self.events[0][0] <= time:
            now, _, where, what = heapq.heappop(self.events)
            replica = self.replicas[where]
            if isinstance(what, Picture):
                replica.coming -= 1
                replica.backlog += 1
                replica.waiting.setdefault(what.concept if self.split else -1, deque()).append(what)
                self._arrived(where, replica, what, now)
            elif what[0] == replica.plan:
                self._boundary(where, replica, now, what[1])

    def _choose(self, concept: int, pair: np.ndarray) -> int:
        if self.split and len(self.replicas) > 1:
            homes = [_home(concept, n, len(self.replicas)) for n in range(self.a.choices)]
            best = min(homes, key=lambda where: self.replicas[where].load())
            if self.replicas[best].load() <= 2 * self.a.batch:
                return best
        return int(min(pair, key=lambda where: self.replicas[where].load()))

    def _fetch(self, where: int, picture: Picture, age: float) -> float:
        """Seconds until the concept's file is in the host's memory. If the concept is not in the bank, the picture notes its adoption."""
        key = where, picture.concept
        last = self.used.get(key, -age * self.homes / (self.shares[picture.concept] * self.rate))
        self.used[key] = picture.arrival
        bank, host = (picture.arrival - last >= window for window in self.windows)
        self.misses[0] += bank
        self.misses[1] += host
        picture.adoption = self.machine.adoption if bank else 0.0
        return self.a.store_seconds + self.machine.from_file if host else 0.0

    def _arrived(self, where: int, replica: Replica, picture: Picture, now: float) -> None:
        if not replica.running:
            self._boundary(where, replica, now, 0)
        elif len(replica.running) < self.a.batch and (not self.split or self._joins(replica, picture.concept)):
            done = max(0, math.ceil((now - replica.begin) / replica.seconds - 1e-9))
            if done < min(each.left for each in replica.running):
                self._plan(where, replica, done)

    def _joins(self, replica: Replica, concept: int) -> bool:
        """Whether a running batch of `split` takes one more: of its concept, until others that wait have been kept for a batch's number."""
        return concept == replica.concept and (replica.taken < self.a.batch or len(replica.waiting) == 1)

    def _plan(self, where: int, replica: Replica, steps: int) -> None:
        replica.plan += 1
        self._push(replica.begin + steps * replica.seconds, where, (replica.plan, steps))

    def _boundary(self, where: int, replica: Replica, now: float, steps: int) -> None:
        """Behind `steps` of the stretch: who is finished leaves, who waits joins, and the next stretch is planned to the first end."""
        machine, running = self.machine, replica.running
        replica.busy += steps * replica.seconds
        replica.rows += steps * replica.seconds * len(running)
        for picture in running:
            picture.left -= steps
        done = [picture for picture in running if picture.left == 0]
        begin = max(now, replica.begin) + len(done) * machine.decoding
        replica.busy += len(done) * machine.decoding
        replica.rows += len(done) * machine.decoding * len(running)
        for picture in done:
            self.served.append((picture.arrival, (begin - picture.arrival) / picture.alone))
        replica.running = running = [picture for picture in running if picture.left]
        seconds = self._admit(replica)
        replica.busy += seconds
        replica.begin = begin + seconds
        replica.plan += 1
        if replica.running:
            replica.seconds = self.step[len(replica.running)]
            self._plan(where, replica, min(picture.left for picture in replica.running))

    def _admit(self, replica: Replica) -> float:
        """Fills the batch. Seconds of the device that concepts take which come into the bank, and a change of concept."""
        seconds, limit = 0.0, self.a.batch
        if self.split and not replica.running and replica.waiting:
            concept = next(iter(replica.waiting))
            replica.taken = 0
            if concept != replica.concept:
                replica.concept, seconds = concept, self.a.switch_seconds
        queue = replica.waiting.pop(replica.concept, None)
        while queue and len(replica.running) < limit and (not self.split or replica.taken < limit or not replica.waiting):
            picture = queue.popleft()
            replica.running.append(picture)
            replica.taken += 1
            replica.backlog -= 1
            seconds += picture.adoption
        if queue:
            replica.waiting[replica.concept] = queue  # behind the others
        return seconds


def _home(concept: int, number: int, replicas: int) -> int:
    """A replica for a concept, the same in every process."""
    mixed = (concept * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 31)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ (mixed >> 29)) % replicas


def simulate(
    machine: Machine, a: Assumptions, policy: str, replicas: int, load: float, shares: np.ndarray | None = None
) -> dict[str, float]:
    """Figures of one fleet. load: pictures that arrive, as a part of what replicas with full batches draw (`capacity`)."""
    shares = popularity(a) if shares is None else shares
    return Fleet(machine, a, policy, replicas, load * replicas * capacity(machine, a), shares).run()


def sustained(machine: Machine, a: Assumptions, policy: str, replicas: int, shares: np.ndarray) -> float:
    """The greatest load at which the 95th percentile is at most `goal`, to 2 %."""
    low, high = 0.0, 1.2
    for _ in range(6):
        middle = (low + high) / 2
        within = simulate(machine, a, policy, replicas, middle, shares)["p95"] <= a.goal
        low, high = (middle, high) if within else (low, middle)
    return low


FLEETS, LOADS = (1, 8, 64, 1000), (0.5, 0.8, 0.95)
SEARCHED = 64  # replicas of the largest fleet whose greatest load is looked for
OVERLOADED = 0.03  # more pictures than this part are waiting at the end: queues grow as long as pictures come


def simulations(
    machine: Machine, a: Assumptions, fleets: tuple[int, ...] = FLEETS, loads: tuple[float, ...] = LOADS
) -> Iterator[dict[str, Any]]:
    """Rows: of each fleet the figures at each load, and the load that it sustains."""
    shares = popularity(a)
    for replicas in fleets:
        found = {}
        for policy in POLICIES:
            for load in loads:
                figures = {name: float(f"{value:.4g}") for name, value in simulate(machine, a, policy, replicas, load, shares).items()}
                yield row(machine, a, f"{replicas} replicas, load {load:g}", policy, replicas=replicas, load=load, **figures)
            if replicas > SEARCHED:  # six simulations more
                continue
            found[policy] = sustained(machine, a, policy, replicas, shares)
            yield row(machine, a, f"{replicas} replicas, sustained", policy, replicas=replicas, sustained=round(found[policy], 3))


def misses(machine: Machine, a: Assumptions, replicas: int = 64, load: float = 0.8) -> Iterator[dict[str, Any]]:
    """Rows: misses by the bytes of one concept in the same memory; by bench/model.py, in a slot of the bank, or a LoRA's file."""
    from bench import model as paper

    shares = popularity(a)
    for name in paper.UNETS:
        for what, size in (("perfusion", paper.concept_bytes(name)), ("LoRA, rank 16", paper.UNETS[name].lora_bytes)):
            figures = simulate(dataclasses.replace(machine, concept_bytes=size), a, "mixed", replicas, load, shares)
            kept = {key: float(f"{figures[key]:.3g}") for key in ("bank_misses", "host_misses", "p95")}
            yield row(machine, a, f"misses, {name}", what, replicas=replicas, load=load, concept_bytes=size, **kept)


def row(machine: Machine, a: Assumptions, case: str, provider: str, **more: Any) -> dict[str, Any]:
    steps = "measured" if machine.gate == "passed" else machine.gate
    return {
        "suite": "serve_sim", "case": f"{machine.name}, {case}", "provider": provider, "dtype": "", "gate": "simulated",
        "device": f"{machine.name}, steps {steps}", "model": machine.name, "steps": steps, **more, "assumptions": dataclasses.asdict(a),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, of the rows of one machine."""
    name, steps = rows[0]["model"], rows[0]["steps"]
    lines = [f"**{name}: simulated, with step times that are {steps}; latency over that on an empty fleet**", ""]
    heads = (
        "replicas",
        "load",
        "mixed: p50",
        "p95",
        "p99",
        "pictures in a batch",
        "split: p50",
        "p95",
        "p99",
        "pictures in a batch",
        "cost of split",
    )
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    found = {(each["replicas"], each["load"], each["provider"]): each for each in rows if "fill" in each}
    for replicas, load in dict.fromkeys(key[:2] for key in found):
        mixed, split = (found[replicas, load, policy] for policy in POLICIES)
        ratio = f"{split['device_seconds'] / mixed['device_seconds']:.2f}"
        lines.append(f"| {replicas:,} | {load:g} | {_latencies(mixed)} | {_latencies(split)} | {ratio} |")
    held = {(each["replicas"], each["provider"]): each["sustained"] for each in rows if "sustained" in each}
    if held:
        goal = rows[0]["assumptions"]["goal"]
        lines += [
            "",
            f"Greatest load with p95 at most {goal:g}:",
            "",
            "| replicas | mixed | split | mixed over split |",
            "|---|---|---|---|",
        ]
        for replicas in dict.fromkeys(key[0] for key in held):
            mixed, split = (held[replicas, policy] for policy in POLICIES)
            lines.append(
                f"| {replicas:,} | {mixed:.2f} | {split:.2f} | {mixed / split:.1f} |" if split else f"| {replicas:,} | {mixed:.2f} | 0 | |"
            )
    missed = [each for each in rows if "concept_bytes" in each]
    if missed:
        a = missed[0]["assumptions"]
        sizes = f"{a['bank_bytes'] / 1e9:g} GB on a device, {a['host_bytes'] / 1e9:g} GB on a host, {a['concepts']:,} concepts"
        lines += ["", f"Pictures whose concept has to be fetched ({sizes}):", ""]
        lines += ["| concepts of | as | bytes of one | to the device | to the host |", "|---|---|---|---|---|"]
        for each in missed:
            model = each["case"].rsplit(" ", 1)[1]
            numbers = f"{each['concept_bytes']:,} | {100 * each['bank_misses']:.1f} % | {100 * each['host_misses']:.1f} %"
            lines.append(f"| {model} | {each['provider']} | {numbers} |")
    return "\n".join(lines)


def _latencies(row: dict[str, Any]) -> str:
    grows = row["waiting"] > OVERLOADED
    late = ["grows"] * 3 if grows else [f"{row[name]:.2f}" for name in ("p50", "p95", "p99")]
    return " | ".join([*late, f"{row['fill']:.1f}"])


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Latency by load, sustained load by replicas, misses by bytes; with a digest of the rows and of this file, as bench/plot.py has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from bench import plot

    with pyplot.rc_context({"font.size": 9, "axes.titlesize": 10, "text.color": plot.INK, "axes.edgecolor": "#999999"}):
        figure = pyplot.figure(figsize=(10, 3.4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        measured_rows = [each for each in rows if each["steps"] == "measured"]
        colours = {"mixed": plot.OURS, "split": plot.OTHERS[0]}
        fleet = max((each["replicas"] for each in measured_rows if "fill" in each and each["replicas"] <= 64), default=1)
        for policy, colour in colours.items():
            mine = [each for each in measured_rows if "fill" in each and (each["replicas"], each["provider"]) == (fleet, policy)]
            for name, style in (("p50", "o:"), ("p95", "o-"), ("p99", "o--")):
                points = [
                    (each["load"], each[name]) for each in sorted(mine, key=lambda each: each["load"]) if each["waiting"] <= OVERLOADED
                ]
                if points:
                    left.plot(*zip(*points), style, color=colour, ms=4, label=f"{policy}, {name}")
            grows = [each["load"] for each in mine if each["waiting"] > OVERLOADED]
            if grows:
                left.axvspan(min(grows), 1.0, color=colour, alpha=0.12, lw=0)
                left.text(0.99, 0.97, f"{policy}: queues grow", color=colour, ha="right", va="top", transform=left.transAxes, fontsize=8)
        left.set(yscale="log", xlabel="load: part of what full batches draw", ylabel="latency over an empty fleet's", xlim=(0, 1))
        left.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        left.minorticks_off()
        left.set_title(f"toybox, {fleet} replicas")
        left.legend(frameon=False, fontsize=7, loc="upper left")
        for place, name in enumerate(dict.fromkeys(each["model"] for each in rows)):
            mine = [each for each in rows if each["model"] == name and "sustained" in each]
            fill = plot.OURS if mine and mine[0]["steps"] == "measured" else "white"
            points = []
            for replicas in sorted({each["replicas"] for each in mine}):
                held = {each["provider"]: each["sustained"] for each in mine if each["replicas"] == replicas}
                if held.get("split"):
                    points.append((replicas, held["mixed"] / held["split"]))
            if points:
                style = "o-" if fill != "white" else ("s--", "^--", "v--")[place % 3]
                middle.plot(*zip(*points), style, color=plot.OURS, mfc=fill, ms=5, label=f"{name}, steps {mine[0]['steps']}")
        middle.set(xscale="log", xlabel="replicas", ylabel="load of mixed over that of split")
        middle.set_ylim(bottom=0)
        middle.axhline(1, color=plot.INK, lw=0.8)
        middle.set_title("load sustained within the goal")
        middle.legend(frameon=False, fontsize=7)
        missed = [each for each in rows if "concept_bytes" in each]
        names = [f"{each['case'].rsplit(' ', 1)[1]}, {each['provider']}" for each in missed]
        for place, (what, alpha) in enumerate((("bank_misses", 0.95), ("host_misses", 0.45))):
            bars = right.barh(
                [n + 0.36 * (place - 0.5) for n in range(len(missed))], [100 * each[what] for each in missed], 0.34,
                color=[plot.OURS if each["provider"] == "perfusion" else plot.OTHERS[0] for each in missed], alpha=alpha,
            )  # fmt: skip
            right.bar_label(bars, [f"{100 * each[what]:.1f}" for each in missed], fontsize=7, padding=2)
        right.set_yticks(range(len(names)), names)
        right.invert_yaxis()
        right.margins(x=0.15)
        right.set(xlabel="% of pictures; pale: to the host as well", title="concepts to be fetched")
        for axes in (left, middle):
            plot.tidy(axes, "both")
        plot.tidy(right, "x")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=130, metadata={"rows": digest(rows), "Software": None})
        pyplot.close(figure)


def digest(rows: list[dict[str, Any]]) -> str:
    import hashlib
    import json

    return hashlib.sha256((json.dumps(rows, sort_keys=True) + Path(__file__).read_text(encoding="utf-8")).encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a .jsonl file, written anew: toybox as measured; sd15 and sdxl as predicted; misses")
    parser.add_argument("--plot", type=Path, help="a .png file, drawn from bench/results/serve_sim.jsonl; nothing is simulated")
    parser.add_argument("--rows", type=Path, default=RESULTS / "serving.jsonl", help="rows of the suite serving")
    parser.add_argument("--predicted", choices=["sd15", "sd21", "sdxl"], help="step times of an H200 on paper instead")
    parser.add_argument("--replicas", type=int, action="append", help=f"may be repeated; by default {FLEETS}")
    parser.add_argument("--loads", type=float, action="append", help=f"may be repeated; by default {LOADS}")
    for field in dataclasses.fields(Assumptions):
        kind = int if field.type == "int" else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=f"default {field.default:g}")
    options = parser.parse_args()
    from bench.rows import append, read

    if options.plot:
        draw(read(RESULTS / "serve_sim.jsonl"), options.plot)
        print(options.plot)
        return
    a = Assumptions(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Assumptions)})
    fleets, loads = tuple(options.replicas or FLEETS), tuple(options.loads or LOADS)
    machine = predicted(options.predicted, a) if options.predicted else measured(read(options.rows))
    if options.out is None:
        print(table(list(simulations(machine, a, fleets, loads))))
        return
    options.out.unlink(missing_ok=True)
    for each in [machine] if options.predicted else [machine, predicted("sd15", a), predicted("sdxl", a)]:
        for found in simulations(each, a, fleets if each is machine else tuple(n for n in fleets if n < 1000), loads):
            append(options.out, found)
    for found in misses(machine, a):
        append(options.out, found)
    print(f"{options.out}. python bench/report.py {options.out}")


if __name__ == "__main__":
    main()
