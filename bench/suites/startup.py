"""The cost of a fresh process until it can be used: processor time and peak memory of imports and commands, beside `import torch`.

A sample is a process, timed by the processor's time that it took, which others on the machine do not lengthen as they do a wait. Only
ratios mean anything, as everywhere on a CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import rows
from bench.measure import Options
from bench.timing import Candidate, facts, interleave

COMMANDS = {
    "import torch": "import torch",
    "import perfusion_kernels": "import perfusion_kernels",
    "import perfusion": "import perfusion",
    "import diffusers' pipeline": "from diffusers import StableDiffusionPipeline",
    "perfusion.attach": "from diffusers import StableDiffusionPipeline; import perfusion; perfusion.attach",
    "perfusion --help": "import sys; sys.argv = ['perfusion', '--help']; from perfusion.cli import main; main()",
}
PEAK = "print('peak', *(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def children() -> float:
    """CPU seconds of child processes that this one has waited for."""
    times = os.times()
    return times.children_user + times.children_system


def measured(options: Options) -> Iterator[dict[str, Any]]:
    if not os.path.exists("/proc/self/status"):
        raise OSError("the suite startup reads /proc, which Linux has")
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
            admitted.append(Candidate(name, process(code)))
    rounds = (2, 2) if options.quick else options.rounds
    cpu = torch.device("cpu")
    timed = interleave(admitted, cpu, seconds=options.seconds * len(admitted), rounds=rounds, clock=children)
    times = dict(zip((candidate.provider for candidate in admitted), timed))
    for name in COMMANDS:
        row = {
            "suite": "startup", "case": "a fresh process", "provider": name, "dtype": "none", "shapes": {}, **rows.provenance("cpu"),
            "load": rows.load(), "quick": options.quick,
        }  # fmt: skip
        if name in reasons:
            yield {**row, "gate": "not passed", "reason": reasons[name]}
            continue
        found = facts(times, name)
        found.pop("processor_ratios", None)  # of this process, which waits for the others
        yield {
            **row, "gate": "passed", **found, "calls": 1, "peak_bytes": peaks[name], "l2": "warm", "clock": "processor time",
        }  # fmt: skip
