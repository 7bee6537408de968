"""The kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, to which a thread of a block is one."""

import os
import re
import subprocess

import pytest

from .build import ROOT, Change, build, only_widths

ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
THREAD = ("-fsanitize=thread", "-DPERFUSION_THREAD_SANITIZER", "-g1")
FEW = only_widths(40)
BARRIERS = [
    f"{path.name}:{number}"
    for path in sorted((ROOT / "csrc").rglob("*.cuh"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(r"\b(warp_)?barrier\(\);", line)
]


def sweep(flags: tuple[str, ...], *arguments: str, changes: tuple[Change, ...] = ()) -> subprocess.CompletedProcess:
    command = [build("sweep", "sweep.cpp", flags=flags, changes=FEW + changes), *arguments]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "unexpected memory mapping" in ran.stderr:  # ThreadSanitizer of older compilers, where addresses are drawn from too wide a range
        ran = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, env=environment)
    return ran


@pytest.mark.parametrize("flags", (ADDRESS, THREAD), ids=("address", "thread"))
def test_nothing_to_report(flags):
    ran = sweep(flags)
    reports = [line for line in ran.stderr.splitlines() if "swapcontext" not in line]  # a general remark on programs with fibers
    assert (ran.returncode, ran.stdout, reports) == (0, "", [])


def test_an_overrun_is_reported():
    """One token too many of the last tile."""
    longer = Change("query_stream.cuh", "    if (n >= N) continue;\n", "    if (n > N) continue;\n")
    assert "AddressSanitizer: heap-buffer-overflow" in sweep(ADDRESS, changes=(longer,)).stderr


@pytest.mark.parametrize("barrier", BARRIERS)
def test_without_a_barrier_a_race_is_reported(barrier):
    """Each barrier of each kernel, left out: no kernel has one too many, and none could lose one unseen."""
    ran = sweep(THREAD, barrier)
    if "ThreadSanitizer: SEGV" not in ran.stderr:  # after an index that is not there yet
        assert "ThreadSanitizer: data race" in ran.stderr, ran.stdout + ran.stderr
        assert "Location is heap block" in ran.stderr and "allocated by main thread" in ran.stderr  # of shared memory, not a lane's stack


def test_a_race_of_two_blocks_is_reported():
    """Blocks that share a head and all do the whole of it: they write the same values, so no result is wrong."""
    all_of_it = (
        Change("query_stream.cuh", "tile(split * plan.warps + warp())", "tile((void(split), warp()))"),
        Change("query_stream.cuh", "step(plan.splits * plan.warps)", "step(plan.warps)"),
    )
    ran = sweep(THREAD, changes=all_of_it)
    assert ran.stdout == "" and "ThreadSanitizer: data race" in ran.stderr


def test_a_workspace_that_two_blocks_share_is_reported():
    """One block runs after the other here, so no result is wrong."""
    shared = Change("concept_gates.cuh", "+ block() * system_floats(J)", "+ 0 * system_floats(J)")
    ran = sweep(THREAD, changes=(shared,))
    assert ran.stdout == "" and "ThreadSanitizer: data race" in ran.stderr
