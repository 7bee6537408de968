"""The host's side of the device layer (csrc/device/launch.h) over a stand-in for CUDA's runtime, under ThreadSanitizer."""

import os
import subprocess

from .build import ROOT


def test_threads_do_not_take_each_other_s_limits_away(tmp_path):
    """Of two kernels on two devices, each attribute is set once, whoever comes first, and never under a capture's rules."""
    here = ROOT / "tests" / "cuda_host"
    program = tmp_path / "launches"
    flags = ("-std=c++17", "-O1", "-g", "-fsanitize=thread", "-Wall", "-Wextra", "-Werror", f"-I{here / 'stand_in'}")
    subprocess.run(["g++", *flags, here / "launches.cpp", ROOT / "csrc/status.cpp", "-o", program, "-pthread"], check=True)
    for said, planned in (("0", "0"), ("64", "64"), ("-1", "4"), ("6x", "4"), ("", "4"), ("99999999999999999999", "4")):
        subprocess.run([program, planned], env={**os.environ, "PERFUSION_MULTIPROCESSORS": said}, check=True)
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout == "0 failed, 4 attributes, 0 in a capture, 3200 launches, 1600 of them early, 0 where that cannot be\n"
