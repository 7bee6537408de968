"""The server under load, beside the same server that never mixes concepts in a forward, as engines that batch by adapter do.

    PYTHONPATH=.:python python bench/serve_load.py                     # toybox; minutes
    PYTHONPATH=.:python python bench/serve_load.py --clients 64 --steps 10 --rows 16 --json serve_load.json

Both servers run in this one program's run, one after the other, on loopback, with the same requests: as many clients as concepts, each
with a concept of its own. `burst`: all at once. `poisson`: arrivals at random, at a rate between what the two have shown they can do.
Only ratios are told: throughput, mixed over split, and latencies, split over mixed; both above 1 where mixing is better. Then, of one
process without HTTP, what the pictures of one full forward pay for. A server
that splits sees its whole queue, so it fills a forward wherever two requests have one concept.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
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


def measure(url: str, delays: list[float], steps: int) -> dict[str, float]:
    before = mean_rows(url)
    latencies, seconds = asyncio.run(fire(url, delays, steps))
    rows, forwards = (after - old for after, old in zip(mean_rows(url), before))
    quantiles = statistics.quantiles(latencies, n=100, method="inclusive")
    return {"throughput": len(delays) / seconds, "p50": quantiles[49], "p95": quantiles[94], "p99": quantiles[98], "rows": rows / forwards}


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


def run(model: str, tenants: list[int], steps: int, rows: int, seed: int = 0) -> list[dict[str, object]]:
    """A row per load: its name, how many clients, ratios, and the mean number of pictures in a forward of both servers."""
    files = concepts(model, max(tenants))
    found: dict[bool, dict[tuple[str, int], dict[str, float]]] = {}
    rates: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for split in (True, False):
            settings = Settings(
                models={"model": model}, folder=Path(folder) / str(split), port=0, rows=rows, split_by_concept=split, timeout=3600,
                train=False,
            )  # fmt: skip
            found[split] = {}
            with running(settings) as url:
                for number, data in enumerate(files):
                    sent = httpx.post(f"{url}/v1/concepts", files={"file": data}, data={"name": f"c{number}"})
                    sent.raise_for_status()
                measure(url, [0.0] * min(tenants), 2)  # warm
                for count in tenants:
                    found[split]["burst", count] = measure(url, [0.0] * count, steps)
                    if split:  # twice what it can do, which the other is to be able to
                        rates[count] = 2 * found[split]["burst", count]["throughput"]
                    chance, at, delays = random.Random(seed), 0.0, []
                    for _ in range(count):
                        at += chance.expovariate(rates[count])
                        delays.append(at)
                    found[split]["poisson", count] = measure(url, delays, steps)
    table = []
    for load in found[True]:
        apart, mixed = found[True][load], found[False][load]
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
    parser.add_argument("--json", type=Path, help="write the table there as well")
    options = parser.parse_args()
    table = run(options.model, options.clients, options.steps, options.rows)
    print("| load | clients = concepts | throughput | p50 | p95 | p99 | pictures a forward, mixed | split |")
    print("|---|---|---|---|---|---|---|---|")
    for row in table:
        ratios = " | ".join(f"{row[key]:.2f}" for key in ("throughput", "p50", "p95", "p99", "rows_mixed", "rows_split"))
        print(f"| {row['load']} | {row['clients']} | {ratios} |")
    torch.set_num_threads(1)
    seconds = parts(options.model, concepts(options.model, options.rows), options.rows, options.steps)
    print("\n| part | share of the processor's time, mixed | split over mixed |\n|---|---|---|")
    for row in seconds:
        print(f"| {row['part']} | {row['share']:.0%} | {row['split']:.2f} |")
    if options.json:
        settings = {"model": options.model, "steps": options.steps, "rows": options.rows}
        options.json.write_text("".join(json.dumps(settings | row) + "\n" for row in (*table, *seconds)))


if __name__ == "__main__":
    main()
