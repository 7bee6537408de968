"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

import subprocess

from .build import Change, build, only_widths

ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
FEW = only_widths(40, 64)


def sweep(flags: tuple[str, ...], changes: tuple[Change, ...] = ()) -> subprocess.CompletedProcess:
    path = build("sweep", "sweep.cpp", flags=flags, changes=FEW + changes)
    return subprocess.run([path], capture_output=True, text=True)


def test_nothing_to_report():
    ran = sweep(ADDRESS)
    reports = [line for line in ran.stderr.splitlines() if "swapcontext" not in line]  # a general remark on programs with fibers
    assert (ran.returncode, ran.stdout, reports) == (0, "", [])


def test_an_overrun_is_reported():
    """One token too many of the last tile."""
    longer = Change("query_stream.cuh", "    if (n >= N) continue;\n", "    if (n > N) continue;\n")
    assert "AddressSanitizer: heap-buffer-overflow" in sweep(ADDRESS, (longer,)).stderr
