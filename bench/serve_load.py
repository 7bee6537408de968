"""The server under load, beside the same server that never mixes concepts in a forward, as engines that batch by adapter do.

    PYTHONPATH=.:python python bench/serve_load.py                     # toybox; minutes
    PYTHONPATH=.:python python bench/serve_load.py --clients 16 64 --steps 8 --rows 16 --json bench/results/serve_load.jsonl

Both servers run in this one program's run, on loopback, with the same requests: as many clients as concepts, each with a concept of its
own. They take turns, --repeats times at each load, the other one idle. `burst`: all at once. `poisson`: arrivals at random, at twice the
rate at which the one that splits has drawn the burst. Only ratios are told: throughput, mixed over split, and latencies, split over mixed;
both above 1 where mixing is better. A server that splits sees its whole queue, so it fills a forward wherever two requests have one
concept. Then, of one process in one thread without HTTP: what a forward of several pictures costs, over as many forwards of one, which is
the most that mixing can gain; and what the pictures of one full forward pay for.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import torch

from perfusion.base import describe_base
from perfusion.concept import Concept
from perfusion.models import load_pipeline
from perfusion.serve import Settings, running
from perfusion.serve.batching import Batcher
from perfusion.serve.drawing import ConceptUse, Drawing

PROMPTS = ("a <mine>", "a photo of a <mine>", "a <mine> on the beach", "a small <mine>")


def concepts(model: str, count: int) -> list[bytes]:
    """Files of concepts for a model: its own word with random outputs. What they draw is noise; what they cost is what any costs."""
    pipe = load_pipeline(model, device="cpu")
    base, generator = describe_base(pipe), torch.Generator().manual_seed(0)
    word = next(each for each in ("teddy", "dog", "cup", "ball") if len(pipe.tokenizer(each, add_special_tokens=False).input_ids) == 1)
    with torch.no_grad():
        encoding = pipe.encode_prompt(f"a {word}", "cpu", 1, False)[0][0, 2].float()

    def noise(size: int) -> torch.Tensor:
        return 0.1 * torch.randn(size, generator=generator)

    return [
        Concept(
            name="mine", superclass=word, base=base, value_outputs=noise(base.outputs), target=encoding + noise(len(encoding)),
            metric_target=encoding, superclass_encoding=encoding, word_embeddings=tuple(map(noise, base.text_widths)),
        ).to_bytes()
        for _ in range(count)
    ]  # fmt: skip


async def fire(url: str, delays: list[float], steps: int) -> tuple[list[float], float]:
    """One request per client at its time; the latencies, and the seconds from the first to the last answer."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=3600, limits=limits) as http:

        async def ask(client: int, delay: float) -> float:
            await asyncio.sleep(delay)
            started = time.perf_counter()
            body = {
                "prompt": PROMPTS[client % len(PROMPTS)], "steps": steps, "seed": client,
                "concepts": [{"name": "mine", "concept": f"c{client}"}],
            }  # fmt: skip
            answer = await http.post("/v1/images/generations", json=body)
            answer.raise_for_status()
            return time.perf_counter() - started

        started = time.perf_counter()
        latencies = await asyncio.gather(*(ask(client, delay) for client, delay in enumerate(delays)))
        return list(latencies), time.perf_counter() - started


def mean_rows(url: str) -> tuple[float, float]:
    """Pictures in all forwards so far, and forwards."""
    lines = [line.split() for line in httpx.get(f"{url}/metrics").text.splitlines()]
    found = {line[0]: float(line[1]) for line in lines if line[0].startswith("perfusion_batch_rows_") and len(line) == 2}
    return found["perfusion_batch_rows_sum"], found["perfusion_batch_rows_count"]


@dataclasses.dataclass
class Measured:
    """What one server did at one load, in all its turns: latencies and seconds of the requests, pictures in how many forwards."""

    latencies: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    rows: float = 0.0
    forwards: float = 0.0

    def turn(self, url: str, delays: list[float], steps: int) -> float:
        """Send the requests once; pictures a second."""
        before = mean_rows(url)
        latencies, seconds = asyncio.run(fire(url, delays, steps))
        rows, forwards = (after - old for after, old in zip(mean_rows(url), before))
        self.latencies += latencies
        self.seconds, self.rows, self.forwards = self.seconds + seconds, self.rows + rows, self.forwards + forwards
        return len(delays) / seconds

    def table(self) -> dict[str, float]:
        quantiles = statistics.quantiles(self.latencies, n=100, method="inclusive")
        found = {"throughput": len(self.latencies) / self.seconds, "rows": self.rows / self.forwards}
        return found | {"p50": quantiles[49], "p95": quantiles[94], "p99": quantiles[98]}


class _Inline(concurrent.futures.Executor):
    def submit(self, function, *arguments):
        function(*arguments)


def parts(model: str, files: list[bytes], rows: int, steps: int) -> list[dict[str, object]]:
    """Where the processor's time goes: of `rows` pictures with a concept each, drawn in one process without HTTP, mixed and split.

    share: of all seconds of the mixed ones. split: seconds over those of the mixed ones.
    """
    names = {"forward": "UNet", "advance": "schedulers", "_prepare": "prompts, keys and values", "_finish": "VAE and files"}
    found: dict[bool, dict[str, float]] = {}
    pipe = load_pipeline(model, device="cpu")
    for split in (True, False, True, False):  # the first of each warms
        options = dict(rows=rows, split_by_concept=split, side=_Inline())
        batcher = Batcher({"model": pipe}, lambda digest: files[int(digest)], lambda _: None, **options)
        batcher.step()
        base, spent = batcher.bases["model"], dict.fromkeys(names, 0.0)

        def timed(owner: object, name: str, spent: dict[str, float] = spent) -> None:
            function = getattr(owner, name)

            def called(*arguments):
                started = time.process_time()
                try:
                    return function(*arguments)
                finally:
                    spent[name] += time.process_time() - started

            setattr(owner, name, called)

        for name in names:
            timed(base if hasattr(base, name) else batcher, name)
        width, height = base.default_size
        started = time.process_time()
        for number in range(rows):
            use = ConceptUse("mine", f"{number:064}")
            plain = dict(model="model", prompt="a <mine>", width=width, height=height, steps=steps, guidance_scale=4.0)
            batcher.submit(Drawing(id=str(number), seed=number, concepts=(use,), **plain))
        while batcher.working:
            batcher.step()
        found[split] = {"all": time.process_time() - started, **{names[name]: seconds for name, seconds in spent.items()}}
        base.handle.detach()
    mixed, apart = found[False], found[True]
    return [{"part": part, "share": mixed[part] / mixed["all"], "split": apart[part] / mixed[part]} for part in mixed]


def forwards(model: str, files: list[bytes], sizes: tuple[int, ...], repeats: int = 5) -> list[dict[str, object]]:
    """What a step of several pictures with a concept each costs, in processor time, over as many steps of one; by the server's batcher.

    unet: that of the UNet alone. all: with the schedulers, and what the server itself does at a step. beside: the part of that in all.
    """
    pipe = load_pipeline(model, device="cpu")
    batcher = Batcher({"model": pipe}, lambda digest: files[int(digest)], lambda _: None, rows=max(sizes), side=_Inline())
    batcher.step()
    base, inside = batcher.bases["model"], [0.0]
    width, height = base.default_size
    for number in range(max(sizes)):
        use = ConceptUse("mine", f"{number:064}")
        plain = dict(model="model", prompt="a <mine>", width=width, height=height, steps=1000, guidance_scale=4.0)
        batcher.submit(Drawing(id=str(number), seed=number, concepts=(use,), **plain))
    batcher.step()
    (group,) = batcher._groups.values()
    unet = pipe.unet.forward

    def timed(*arguments, **options):
        started = time.process_time()
        try:
            return unet(*arguments, **options)
        finally:
            inside[0] += time.process_time() - started

    pipe.unet.forward = timed
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    for _ in range(repeats):  # in turns, so that what else the machine does falls on all of them
        for size in sizes:
            rows, times = group[:size], max(1, 8 // size)
            base.forward(rows)  # the batch is another: what is kept from step to step is made anew
            inside[0], started = 0.0, time.process_time()
            for _ in range(times):
                for row, noise in zip(rows, base.forward(rows)):
                    base.advance(row, noise)
            found[size].append((inside[0] / times, (time.process_time() - started) / times))
    pipe.unet.forward = unet
    base.handle.detach()
    medians = {size: [statistics.median(each) for each in zip(*turns)] for size, turns in found.items()}
    one = medians[sizes[0]]
    return [
        {"forward": size, "unet": size * one[0] / unet, "all": size * one[1] / whole, "beside": 1 - unet / whole}
        for size, (unet, whole) in medians.items()
    ]


def run(model: str, tenants: list[int], steps: int, rows: int, repeats: int, seed: int = 0) -> list[dict[str, object]]:
    """A row per load: its name, how many clients, ratios, and the mean number of pictures in a forward of both servers."""
    files = concepts(model, max(tenants))
    found: dict[tuple[str, int], dict[bool, Measured]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        urls = {}
        for split in (True, False):
            settings = Settings(
                models={"model": model}, folder=Path(folder) / str(split), port=0, rows=rows, split_by_concept=split, timeout=3600,
                train=False, queue_per_key=max(tenants),
            )  # fmt: skip
            urls[split] = servers.enter_context(running(settings))
            for number, data in enumerate(files):
                sent = httpx.post(f"{urls[split]}/v1/concepts", files={"file": data}, data={"name": f"c{number}"}, timeout=600)
                sent.raise_for_status()
            Measured().turn(urls[split], [0.0] * max(tenants), 1)  # warm, and every concept is loaded
        for count in tenants:
            burst = found["burst", count] = {split: Measured() for split in urls}
            poisson = found["poisson", count] = {split: Measured() for split in urls}
            chance = random.Random(seed)
            for _ in range(repeats):
                rate = 2 * burst[True].turn(urls[True], [0.0] * count, steps)
                burst[False].turn(urls[False], [0.0] * count, steps)
                delays = list(itertools.accumulate(chance.expovariate(rate) for _ in range(count)))
                for split in urls:
                    poisson[split].turn(urls[split], delays, steps)
    table = []
    for load, measured in found.items():
        apart, mixed = measured[True].table(), measured[False].table()
        row: dict[str, object] = {"load": load[0], "clients": load[1], "throughput": mixed["throughput"] / apart["throughput"]}
        row |= {key: apart[key] / mixed[key] for key in ("p50", "p95", "p99")}
        table.append(row | {"rows_mixed": mixed["rows"], "rows_split": apart["rows"]})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toybox")
    parser.add_argument("--clients", type=int, nargs="+", default=[16, 64], help="and concepts: each client has its own")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="pictures in one forward at most")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each server at each load")
    parser.add_argument("--json", type=Path, help="write the rows there, in place of those of as many steps that are there")
    parser.add_argument("--inside", action="store_true", help="only what forwards and their parts cost, without servers")
    options = parser.parse_args()
    measured: dict[str, list[dict[str, object]]] = {}  # by what a row of it has and others have not
    if not options.inside:
        measured["load"] = run(options.model, options.clients, options.steps, options.rows, options.repeats)
        print("| load | clients = concepts | throughput | p50 | p95 | p99 | pictures a forward, mixed | split |")
        print("|---|---|---|---|---|---|---|---|")
        for row in measured["load"]:
            ratios = " | ".join(f"{row[key]:.2f}" for key in ("throughput", "p50", "p95", "p99", "rows_mixed", "rows_split"))
            print(f"| {row['load']} | {row['clients']} | {ratios} |")
    torch.set_num_threads(1)
    measured["forward"] = forwards(options.model, concepts(options.model, 32), (1, 2, 4, 8, 16, 32))
    print("\n| pictures in a forward | UNet: as many of one over it | the whole step | beside the UNet |\n|---|---|---|---|")
    for row in measured["forward"]:
        print(f"| {row['forward']} | {row['unet']:.2f} | {row['all']:.2f} | {row['beside']:.1%} |")
    measured["part"] = parts(options.model, concepts(options.model, options.rows), options.rows, options.steps)
    print("\n| part | share of the processor's time, mixed | split over mixed |\n|---|---|---|")
    for row in measured["part"]:
        print(f"| {row['part']} | {row['share']:.0%} | {row['split']:.2f} |")
    if options.json:
        kept = [json.loads(line) for line in options.json.read_text().splitlines()] if options.json.exists() else []
        kept = [row for row in kept if not measured.keys() & row.keys() or row["steps"] != options.steps]
        settings = {"model": options.model, "steps": options.steps, "rows": options.rows}
        new = [settings | row for rows in measured.values() for row in rows]
        options.json.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *new]))


if __name__ == "__main__":
    main()
