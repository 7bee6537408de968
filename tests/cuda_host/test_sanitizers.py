"""The kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, to which a thread of a block is one."""

import re

import pytest

from .build import ROOT, Change
from .sweep import SCHEDULES, concerned, sweep

ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
THREAD = ("-fsanitize=thread", "-DPERFUSION_THREAD_SANITIZER", "-g1")
BARRIERS = [
    f"{path.name}:{number}"
    for path in sorted((ROOT / "csrc").rglob("*.cuh"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(r"\b(warp_)?barrier\(\);", line)
]


@pytest.mark.parametrize("flags", (ADDRESS, THREAD), ids=("address", "thread"))
@pytest.mark.parametrize("multiprocessors", SCHEDULES)
def test_nothing_to_report(flags, multiprocessors):
    ran = sweep(*["dense"] * (flags == THREAD), flags=flags, multiprocessors=multiprocessors)  # a race is one in any layout
    reports = [line for line in ran.stderr.splitlines() if "swapcontext" not in line]  # a general remark on programs with fibers
    assert (ran.returncode, ran.stdout, reports) == (0, "every case is right\n", [])


def test_an_overrun_is_reported():
    """One token too many of the last tile."""
    longer = Change("query_stream.cuh", "    if (n >= N) continue;\n", "    if (n > N) continue;\n")
    assert "AddressSanitizer: heap-buffer-overflow" in sweep("edited_attention", flags=ADDRESS, changes=(longer,)).stderr


@pytest.mark.parametrize("barrier", BARRIERS)
def test_without_a_barrier_a_race_is_reported(barrier):
    """Each barrier of each kernel, left out: no kernel has one too many, and none could lose one unseen."""
    for multiprocessors in SCHEDULES:
        ran = sweep("dense", *concerned(barrier), flags=THREAD, multiprocessors=multiprocessors, drop=barrier)
        if "ThreadSanitizer: SEGV" in ran.stderr:  # after an index that is not there yet
            return
        if "ThreadSanitizer: data race" in ran.stderr:  # of shared memory, not a lane's stack
            assert "Location is heap block" in ran.stderr and "allocated by main thread" in ran.stderr
            return
    raise AssertionError(ran.stdout + ran.stderr)


def test_a_race_of_two_blocks_is_reported():
    """Blocks that share a head and all do the whole of it: they write the same values, so no result is wrong."""
    part = "first, int64_t{tiles} * (part + 1) / plan.splits - first};"
    all_of_it = (Change("edited_attention.cuh", part, "(void(part), void(first), 0), tiles};"),)
    ran = sweep("dense", "edited_attention", flags=THREAD, changes=all_of_it, multiprocessors="64")
    assert ran.stdout == "" and "ThreadSanitizer: data race" in ran.stderr


def test_a_workspace_that_two_blocks_share_is_reported():
    """One block runs after the other here, so no result is wrong."""
    shared = Change("concept_gates.cuh", "+ block() * system_floats(J)", "+ 0 * system_floats(J)")
    ran = sweep("dense", "concept_gates", flags=THREAD, changes=(shared,))
    assert ran.stdout == "" and "ThreadSanitizer: data race" in ran.stderr
