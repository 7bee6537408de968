"""What every backend must do, done by the compiled kernels: the tests of tests/kernels, with the C++ for torch over the kernels that run
on the CPU (tests/kernels/cuda_on_host.py). On a GPU the same tests take the library itself.
"""

import os
import re
import subprocess
import sys

import pytest

from .build import ROOT, build_torch_library

FILES = ("floor", "contract", "concept_gates", "edited_projection", "cross_attention_layer")


@pytest.mark.parametrize("name", FILES)
def test_the_compiled_kernels_are_a_backend_like_any_other(name):
    """Nothing fails and nothing is skipped, in a process of its own: a backend stays registered."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda", f"tests/kernels/test_{name}.py"]
    environment = {**os.environ, "PERFUSION_CUDA_ON_HOST": str(build_torch_library("cuda"))}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-6000:]
    passed, others = re.search(r"(\d+) passed(.*) in ", ran.stdout.splitlines()[-1]).groups()
    assert int(passed) >= 5 and not re.search("skipped|xfailed", others)
