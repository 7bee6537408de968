"""bench/gpu.sh without a GPU: it refuses in a sentence, and with tools that only write down how they were called, all it calls is there."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "dirname", "realpath", "head", "tail", "mkdir", "nproc", "timeout", "tee", "env", "cat", "true")


@pytest.fixture
def tools(tmp_path):
    """A PATH of its own; tools(name, script) puts a program there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))

    def add(name, script):
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)

    add.path = str(folder)
    return add


def run(tools, tmp_path, **variables):
    environment = {"PATH": tools.path, "HOME": os.environ.get("HOME", "/"), **variables}
    return subprocess.run([ROOT / "bench/gpu.sh", tmp_path / "out"], env=environment, capture_output=True, text=True)


def test_without_a_gpu_it_refuses_in_one_sentence(tools, tmp_path):
    for script in (None, "echo 'No devices were found'; exit 9"):
        if script:
            tools("nvidia-smi", script)
        ran = run(tools, tmp_path)
        assert ran.returncode == 2 and ran.stdout == ""
        assert ran.stderr == (
            "bench/gpu.sh: no NVIDIA GPU here (nvidia-smi lists none), and nothing that this script does makes sense without one.\n"
        )
    assert not (tmp_path / "out").exists()


def test_without_its_tools_it_names_them(tools, tmp_path):
    tools("nvidia-smi", "echo 'NVIDIA H200, 9.0'")
    ran = run(tools, tmp_path)
    assert ran.returncode == 2 and "nvcc is not on PATH" in ran.stderr
    for name in ("nvcc", "cmake", "compute-sanitizer", "ninja"):
        tools(name, "exit 0")
    tools("python3", "exit 1")
    ran = run(tools, tmp_path)
    assert ran.returncode == 2 and "python3 has no torch that sees the GPU" in ran.stderr


def test_all_it_calls_is_there(tools, tmp_path):
    log = tmp_path / "calls"
    tools("nvidia-smi", "echo 'NVIDIA H200, 9.0'")
    for name in ("nvcc", "cmake", "compute-sanitizer", "ninja", "python3"):
        tools(name, f'echo "{name} $*" >> {log}; echo "$TORCH_CUDA_ARCH_LIST" >> {log}.arch')
    example = tmp_path / "out/example/example"
    example.parent.mkdir(parents=True)
    example.symlink_to(shutil.which("true"))
    for suite in ("layer", "gates"):  # as if the benchmarks had written them
        (tmp_path / f"out/{suite}.jsonl").touch()
    ran = run(tools, tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    calls = log.read_text().splitlines()
    assert set(re.findall(r"^\S+: passed", ran.stdout, re.MULTILINE)) == {
        f"{stage}: passed"
        for stage in ("build", "example-build", "doctor", "example", "tests", "memcheck", "racecheck", "memcheck-tests")
        + (*(f"bench-{suite}" for suite in ("gates", "projection", "attention", "fused", "layer", "overhead")),)
    }
    for call in calls:
        for word in call.split():
            if re.match(r"(bench|tests|csrc|python)/", word):
                assert (ROOT / word).exists(), call
    assert set(Path(f"{log}.arch").read_text().split()) == {"9.0"}
    assert sum("compute-sanitizer --tool" in call for call in calls) == 3

    from bench.run import parse  # what it passes is understood

    options = [call.split()[2:] for call in calls if "bench/run.py" in call]
    assert [parse(each).suite for each in options] == [["gates"], ["projection"], ["attention"], ["fused"], ["layer"], ["overhead"]]
    pytest_calls = [call for call in calls if "-m pytest" in call]
    names = re.findall(r"def test_(\w+)", (ROOT / "tests/kernels/test_floor.py").read_text())
    for wanted in ("odd_sizes", "poisoned_memory"):
        assert wanted in pytest_calls[-1] and any(wanted in name for name in names)


def test_a_stage_that_fails_is_named_and_the_others_run(tools, tmp_path):
    tools("nvidia-smi", "echo 'NVIDIA H200, 9.0'")
    for name in ("nvcc", "cmake", "ninja"):
        tools(name, "exit 0")
    tools("compute-sanitizer", '[[ $2 != racecheck ]] || { echo "a race"; exit 9; }')
    tools("python3", "exit 0")
    ran = run(tools, tmp_path)
    assert ran.returncode == 1
    assert "racecheck: FAILED with status 9" in ran.stdout and "a race" in ran.stdout and "bench-layer: passed" in ran.stdout
    assert ran.stderr == "Failed: example racecheck\n"  # no example was built
