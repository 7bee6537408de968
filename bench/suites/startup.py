"""How long a fresh process takes until it can be used, and how much memory: of imports and of commands, beside `import torch`.

A sample is a process. On a CPU only ratios mean anything, as everywhere; peak memory is that of the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import rows
from bench.measure import Options
from bench.timing import Contestant, interleave

COMMANDS = {
    "import torch": "import torch",
    "import perfusion_kernels": "import perfusion_kernels",
    "import perfusion": "import perfusion",
    "import diffusers' pipeline": "from diffusers import StableDiffusionPipeline",
    "perfusion.attach": "from diffusers import StableDiffusionPipeline; import perfusion; perfusion.attach",
    "perfusion --help": "import sys; sys.argv = ['perfusion', '--help']; from perfusion.cli import main; main()",
}
PEAK = "import resource as r; print('peak', r.getrusage(r.RUSAGE_SELF).ru_maxrss)"


def measured(options: Options) -> Iterator[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def process(code: str) -> Callable[[], None]:
        return lambda: subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)

    peaks, admitted, reasons = {}, [], {}
    for name, code in COMMANDS.items():
        ran = subprocess.run([sys.executable, "-c", f"import atexit; atexit.register(lambda: exec({PEAK!r})); {code}"],
                             env=environment, capture_output=True, text=True)  # fmt: skip
        if ran.returncode:
            reasons[name] = ran.stderr.strip().splitlines()[-1] if ran.stderr.strip() else f"status {ran.returncode}"
        else:
            peaks[name] = 1024 * int(ran.stdout.split()[-1])
            admitted.append(Contestant(name, process(code)))
    rounds = (2, 2) if options.quick else options.rounds
    cpu = torch.device("cpu")
    timed = interleave(admitted, cpu, seconds=options.seconds * len(admitted), rounds=rounds, clock=time.perf_counter)
    times = dict(zip((contestant.provider for contestant in admitted), timed))
    for name in COMMANDS:
        row = {
            "suite": "startup", "case": "a fresh process", "provider": name, "dtype": "none", "shapes": {}, **rows.provenance("cpu"),
            "load": rows.load(), "quick": options.quick,
        }  # fmt: skip
        if name in reasons:
            yield {**row, "gate": "not passed", "reason": reasons[name]}
            continue
        low, middle, high = (round(1e6 * value, 1) for value in times[name].quantiles())
        ratios = {other: [round(value, 4) for value in times[name].ratio(its)] for other, its in times.items() if other != name}
        yield {
            **row, "gate": "passed", "median_us": middle, "p20_us": low, "p80_us": high, "repeats": len(times[name].samples), "calls": 1,
            "peak_bytes": peaks[name], "l2": "warm", "clock": "wall", "ratios": ratios,
        }  # fmt: skip
