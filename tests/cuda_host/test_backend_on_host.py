"""What every backend must do, done by the compiled kernels: the tests of tests/kernels, with the C++ for torch over the kernels that run
on the CPU (tests/kernels/cuda_on_host.py). On a GPU the same tests take the library itself.
"""

import os
import re
import subprocess
import sys

import pytest

from bench import rows
from perfusion_kernels.cuda import OPERATORS

from .build import ROOT, build_torch_library

REGISTER = "from tests.kernels import cuda_on_host; cuda_on_host.register()"
FILES = ("floor", "contract", "concept_gates", "edited_projection", "cross_attention_layer", "slots_and_regions")


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PERFUSION_CUDA_ON_HOST": str(build_torch_library("cuda"))}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def passed(*arguments: str) -> int:
    """How many tests passed. Nothing fails and nothing is skipped, in a process of its own: a backend stays registered."""
    ran = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    assert ran.returncode == 0, ran.stdout[-6000:]
    count, others = re.search(r"(\d+) passed(.*) in ", ran.stdout.splitlines()[-1]).groups()
    assert not re.search("skipped|xfailed", others), ran.stdout[-6000:]
    return int(count)


@pytest.mark.parametrize("name", FILES)
def test_the_compiled_kernels_are_a_backend_like_any_other(name):
    assert passed("-k", "cuda and not never_passed_over", f"tests/kernels/test_{name}.py") >= 5  # which asks for a backend that there is not


def test_whole_images():
    assert passed("-k", "cuda", "tests/perfusion/test_whole_images.py") == 4


def test_pipelines_take_them():
    """Gates of every prompt are the compiled kernel's, which is the first choice where it runs."""
    asked = "select('concept_gates', cases.positional('concept_gates', cases.make().arguments('concept_gates')))"
    script = f"{REGISTER}; from tests.kernels import cases; from perfusion_kernels.backend import select; print({asked})"
    assert run("-c", script).stdout.split()[-1] == "perfusion_kernels.concept_gates.cuda"
    assert passed("tests/perfusion/test_pipelines.py") >= 5


def test_the_handle_tells_what_they_note():
    """A bad slot in the index of a pipeline's batch: the compiled kernel notes it, and the pipeline's call raises."""
    ran = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda", "tests/perfusion/test_device_errors.py")
    assert ran.returncode == 0 and re.fullmatch(r"1 passed.*", ran.stdout.splitlines()[-1]), ran.stdout[-6000:]


def test_the_doctor_tries_them():
    script = f"{REGISTER}; from perfusion.cli import doctor; [*map(print, doctor.examine())]"
    found = [line for line in run("-c", script).stdout.splitlines() if "cuda on cpu" in line]
    assert len(found) == len(OPERATORS) and all(re.match(r"ok +operator +\w+ +cuda on cpu: largest error \d", line) for line in found)


def test_benchmarks_admit_them(tmp_path):
    """In the run whose rows would hold times, their results pass the gate, in every suite of an operator and in each form."""
    suites = ("gates", "projection", "attention", "fused", "gradients", "layer")
    options = [*("--quick", "--dtype", "float16", "--out", str(tmp_path / "rows.jsonl")), *(f"--suite={suite}" for suite in suites)]
    ran = run("-c", f"{REGISTER}; import runpy, sys; sys.argv[1:] = {options}; runpy.run_path('bench/run.py', run_name='__main__')")
    assert ran.returncode == 0, ran.stderr
    mine = [row for row in rows.read(tmp_path / "rows.jsonl") if row["provider"].startswith("cuda")]
    passed = {(row["suite"], row["provider"]) for row in mine if row["gate"] == "passed"}
    assert passed == {*((suite, "cuda") for suite in suites), ("projection", "cuda fused")}
    others = {(row["operator"], row["reason"]) for row in mine if row["gate"] != "passed"}
    assert others == {(f"{name}_backward", "it has no kernels of these derivatives") for name in ("concept_gates", "edited_attention")}
