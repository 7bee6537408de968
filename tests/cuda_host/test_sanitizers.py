"""The kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, to which a thread of a block is one."""

import subprocess

import pytest

from .build import Change, build, only_widths

ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
THREAD = ("-fsanitize=thread", "-DPERFUSION_THREAD_SANITIZER", "-g1")
FEW = only_widths(40, 64)


def sweep(flags: tuple[str, ...], changes: tuple[Change, ...] = ()) -> subprocess.CompletedProcess:
    path = build("sweep", "sweep.cpp", flags=flags, changes=FEW + changes)
    return subprocess.run([path], capture_output=True, text=True)


@pytest.mark.parametrize("flags", (ADDRESS, THREAD), ids=("address", "thread"))
def test_nothing_to_report(flags):
    ran = sweep(flags)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_a_race_is_reported():
    """Without the barrier after K and V have landed, warps read what others write."""
    lost = Change("edited_attention.cuh", "  wait_for_copies<0>();\n  barrier();\n", "  wait_for_copies<0>();\n")
    assert "ThreadSanitizer: data race" in sweep(THREAD, (lost,)).stderr


def test_an_overrun_is_reported():
    """One token too many of the last tile."""
    longer = Change("edited_attention.cuh", "    if (n >= N) continue;\n", "    if (n > N) continue;\n")
    assert "AddressSanitizer: heap-buffer-overflow" in sweep(ADDRESS, (longer,)).stderr
