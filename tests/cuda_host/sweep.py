"""Builds csrc/example/sweep.cpp with the kernels for the CPU, changed or under a sanitizer, and runs it."""

import os
import subprocess

from .build import Change, build, only_widths

OPERATORS = ("concept_gates", "edited_projection", "edited_attention", "fused_edited_attention")
SCHEDULES = ("0", "64", "1")  # multiprocessors: one block a head and large tiles; several blocks and small ones; several heads a block


def sweep(
    *operators: str, flags: tuple[str, ...] = (), changes: tuple[Change, ...] = (), multiprocessors: str = "0", order: str = "0", drop: str = "",
    width: int = 40,
) -> subprocess.CompletedProcess:
    """Exit status 0 and "every case is right", or what is wrong. order: of a block's threads, 0 forward, 1 backward, 2 shuffled;
    drop: FILE:LINE of a barrier to leave out. width: of a head; no other is compiled."""
    dense, names = [name for name in operators if name == "dense"], [name for name in operators if name != "dense"]
    command = [build("sweep", "csrc/example/sweep.cpp", flags=flags, changes=only_widths(width) + changes), *dense, str(width), *names]
    environment = {
        **os.environ, "TSAN_OPTIONS": "halt_on_error=1", "PERFUSION_HOST_MULTIPROCESSORS": multiprocessors, "PERFUSION_HOST_ORDER": order,
        "PERFUSION_HOST_DROP": drop,
    }  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "unexpected memory mapping" in ran.stderr:  # ThreadSanitizer of older compilers, where addresses are drawn from too wide a range
        ran = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, env=environment)
    return ran


def concerned(file: str) -> tuple[str, ...]:
    """The operators whose kernels use a file of csrc/: its own, or all."""
    name = file.removeprefix("fused_") if file.startswith("fused_edited_projection") else file
    return next(((each,) for each in sorted(OPERATORS, key=len, reverse=True) if name.startswith(each)), OPERATORS)
