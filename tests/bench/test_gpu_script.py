"""bench/gpu.sh without a GPU: it refuses in a sentence, all that it calls is there, and its Python runs for real, in small, on the CPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bench.run
from bench import nsight, roofline, rows, suites
from bench.run import parse

pytestmark = pytest.mark.bench

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / "bench/gpu.sh").read_text()
STAGES = re.search(r'known="([\w ]+)"', SCRIPT)[1].split()
TOOLS = ("bash", "grep", "dirname", "realpath", "head", "tail", "mkdir", "nproc", "timeout", "tee", "env", "cat", "ls", "true")
PROGRAMS = "sweep dense", "sweep dense 160 edited_attention fused_edited_attention", "sweep", "example"
SUITES = [
    ["decide"], ["attention"], ["attention"], ["attention"], ["gates", "fused", "projection"], ["gradients"], ["attention"], ["attention"],
    ["layer"], ["layer"], ["step"], ["train"], ["attention", "layer"],
]  # fmt: skip


@pytest.fixture
def tools(tmp_path):
    """A PATH of its own; tools(name, script) puts a program there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))

    def add(name, script):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)

    add.path = str(folder)
    return add


def run(tools, out, **variables):
    environment = {"PATH": tools.path, "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([ROOT / "bench/gpu.sh", out], env=environment, capture_output=True, text=True)


def test_it_refuses_in_one_sentence(tools, tmp_path):
    for script in (None, "echo 'No devices were found'; exit 9"):
        if script:
            tools("nvidia-smi", script)
        ran = run(tools, tmp_path / "out")
        assert (ran.returncode, ran.stdout) == (2, "")
        assert ran.stderr == (
            "bench/gpu.sh: no NVIDIA GPU here (nvidia-smi lists none), and nothing that this script does makes sense without one.\n"
        )
    ran = run(tools, tmp_path / "out", STAGES="core cores")
    assert ran.returncode == 2 and ran.stderr == f"bench/gpu.sh: there is no stage cores; there are: {' '.join(STAGES)}\n"
    assert not (tmp_path / "out").exists()
    tools("nvidia-smi", "echo 'NVIDIA H200, 9.0'")
    tools("python3", "exit 1")
    ran = run(tools, tmp_path / "out")
    assert ran.returncode == 2 and "python3 has no torch that sees the GPU" in ran.stderr
    ran = run(tools, tmp_path / "out", WHEELS=str(tmp_path))
    assert ran.returncode == 2 and f"the wheels in {tmp_path} cannot be installed" in ran.stderr


def stand_ins(tools, calls, **scripts):
    tools("nvidia-smi", "echo 'NVIDIA H200, 9.0'")
    for name in ("nvcc", "cmake", "ninja", "compute-sanitizer", "python3"):
        tools(name, f'echo "{name} $*" >> {calls}; {scripts.get(name.replace("-", "_"), "")}')


def test_all_it_calls_is_there(tools, tmp_path):
    calls, out = tmp_path / "calls", tmp_path / "out"
    stand_ins(tools, calls, python3=f'echo "$PYTHONPATH $TORCH_CUDA_ARCH_LIST" >> {calls}.environment')
    ran = run(tools, out, PYTHONPATH="/somebody's/own", WHEELS="")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = calls.read_text().splitlines()
    for line in lines:
        for word in line.split():
            if re.match(r"(bench|tests|csrc|python|setup\.py)(/|$)", word):
                assert (ROOT / word).exists(), line
    first, *others = Path(f"{calls}.environment").read_text().splitlines()  # the first looks for a GPU
    assert {first + "9.0", *others} == {f"{ROOT}:{ROOT}/python:/somebody's/own 9.0"}

    measured = [line for line in lines if "bench/run.py" in line]
    options = [parse(line.replace("--device cuda", "--device cpu").split()[2:]) for line in measured]
    assert [each.suite for each in options] == SUITES
    assert all("--device cuda" in line and ("--compile" in line or "--suite decide" in line) for line in measured)
    assert options[-3].dtype == "float16" and options[-3].model == ["sd15"], "whose attention the kernels take"
    sanitized = [re.search(r"--tool (\w+).*/example/(.+)$", line) for line in lines if "compute-sanitizer" in line and "pytest" not in line]
    assert [found.groups() for found in sanitized] == [
        (tool, name) for tool in ("memcheck", "racecheck", "synccheck", "initcheck") for name in PROGRAMS
    ]
    assert {name.split()[0] for name in PROGRAMS} == {path.stem for path in (ROOT / "csrc/example").glob("*.cpp")}
    assert [line.split("-k ")[1] for line in lines if "-m pytest" in line and "sanitizer" not in line] == ["cuda-cuda", "triton-cuda"]
    built = [line for line in lines if "build/cuda/9.0" in line]
    assert len(built) == 3 and not any("--target perfusion_kernels_torch" in line for line in built), "what the library is made of is used again"
    for line in lines:  # tests that are chosen by name
        if "-m pytest" in line and "odd_sizes" in line:
            names = re.findall(r"def test_(\w+)", (ROOT / "tests/kernels/test_floor.py").read_text())
            assert all(any(wanted in name for name in names) for wanted in ("odd_sizes", "poisoned_memory"))


def test_limits_add_up():
    """Of all steps, each as often as it runs: so none takes the time of a later one."""
    found = re.findall(r"^\s*(?:\w+=\S+ )?(?:step|measure|autotune) (\S+) (\d+) ", SCRIPT, re.MULTILINE)
    limits, loops = {name: int(limit) for name, limit in found}, re.findall(r"for (\w+) in (.*); do", SCRIPT)
    for variable, values in loops:
        for name in limits:
            limits[name] *= len(values.split()) if f"${variable}" in name else 1
    report = int(re.search(r"timeout \$\(\((\d+) \* patience\)\) \S+ bench/report.py", SCRIPT)[1])
    assert sum(limits.values()) + report <= int(re.search(r"^budget=(\d+) ", SCRIPT, re.MULTILINE)[1]) <= 540
    assert len(limits) == 20 and limits['"$tool"'] == 48
    assert f"granted=$(((budget - {report} - {limits['autotune']}) * patience))" in SCRIPT
    assert nsight.LIMIT < limits["nsight"], "it says itself that it took too long"


def test_time_that_is_left_over_goes_to_a_later_step_which_is_interrupted(tools, tmp_path):
    calls, out = tmp_path / "calls", tmp_path / "out"
    stand_ins(tools, calls, python3='case "$*" in *--suite\\ decide*) trap "echo interrupted; exit 3" INT; sleep 60 & wait;; esac')
    script = SCRIPT.replace("library 85", "library 6").replace("backends 10", "backends 0").replace("microbenchmarks 15", "microbenchmarks 0")
    copy = tmp_path / "bench/gpu.sh"
    copy.parent.mkdir()
    copy.write_text(script.replace("measure decide 20", "measure decide 0"))
    copy.chmod(0o755)
    tools("sleep", f"exec {shutil.which('sleep')} \"$@\"")
    environment = {"PATH": tools.path, "STAGES": "decide", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([copy, out], env=environment, capture_output=True, text=True)
    seen = re.search(r"decide: FAILED with status 124 after (\d+) of (\d+) s; in the log: interrupted", ran.stdout)
    assert ran.returncode == 1 and seen and 1 <= int(seen[2]) <= 6, f"what the library has left over of 6 s\n{ran.stdout}"


def test_max_autotune_is_asked_of_every_shape_and_again_of_those_that_are_left(tools, tmp_path, monkeypatch, capsys):
    """Over three steps, of which the last is stopped; then once more with the same folder."""
    calls, out = tmp_path / "calls", tmp_path / "out"
    stand_ins(tools, calls)
    assert run(tools, out, STAGES="core layer autotune").returncode == 0
    commands = [line.replace("--device cuda", "--device cpu").split()[1:] for line in calls.read_text().splitlines() if "--missing" in line]
    asked, stop, broken = [], 20, "sdxl, 2 rows, N = 1024, C = 1280"

    def one(suite, planned, options):
        if len(asked) == stop:
            raise KeyboardInterrupt
        assert options.providers == ("cuda", "expert", "expert addmm", "compile max-autotune")
        gate = {"gate": "not passed", "reason": "no compiler"} if stop and planned.case == broken else {"gate": "passed", "repeats": 1}
        asked.append((suite, planned.case))
        row = {"suite": suite, "case": planned.case, "dtype": "float32", "quick": False, **rows.provenance("cpu"), **gate}
        yield from ({**row, "provider": name} for name in ("expert", "compile max-autotune"))

    monkeypatch.setattr(suites, "_one", one)
    monkeypatch.setattr(os, "_exit", sys.exit)

    def call():
        for command in commands:
            monkeypatch.setattr(sys, "argv", command)
            bench.run.main()

    with pytest.raises(SystemExit) as stopped:
        call()
    assert stopped.value.code == bench.run.STOPPED and asked[0] == ("attention", "sdxl, 2 rows, N = 1024, d = 64, J = 0")
    left = capsys.readouterr().err.split("not all rows are there of ")[1].strip()
    first, stop = list(asked), None
    asked.clear()
    call()
    assert len({*first}) == 20 and len({*asked}) == len(asked) == 21 and {*first} & {*asked} == {("layer", broken)}
    assert left == f"21: {'; '.join(map(', '.join, [*asked[1:], ('layer', broken)]))}", "what failed comes last"
    layers = {(model, B, layer) for model, layers in roofline.UNETS.items() for B in (2, 16) for layer in layers}
    assert {*first, *asked} == {
        *(("attention", f"{model}, {B} rows, N = {layer.N}, d = {layer.d}, J = 0") for model, B, layer in layers),
        *(("layer", f"{model}, {B} rows, N = {layer.N}, C = {layer.C}") for model, B, layer in layers),
    }
    call()
    assert len(asked) == 21 and f"0 rows in {out}" in capsys.readouterr().out
    monkeypatch.setattr(rows, "provenance", lambda device, known=rows.provenance: {**known(device), "torch": "9.9"})
    call()
    assert len(asked) == 61, "another torch has rows of its own"


def test_max_autotune_that_time_cuts_short_is_told_and_no_failure(tools, tmp_path):
    calls, out, copy = tmp_path / "calls", tmp_path / "out", tmp_path / "bench/gpu.sh"
    copy.parent.mkdir()
    copy.write_text(re.sub(r"(autotune [\w-]+) \d+ ", r"\1 1 ", re.sub(r"budget=\d+", "budget=30", SCRIPT)).replace("budget - 10 - 11", "1"))
    copy.chmod(0o755)
    tools("sleep", f'exec {shutil.which("sleep")} "$@"')
    environment = {"PATH": tools.path, "STAGES": "autotune", "TRITON_CACHE_DIR": "/own"}
    for status, told in ((75, "autotune: cut short after "), (1, "autotune: FAILED with status 1 after ")):
        script = f'case "$*" in *--missing*) trap "echo what is left; exit {status}" INT; sleep 9 & wait;; esac'
        stand_ins(tools, calls, python3=f'echo "$TORCHINDUCTOR_CACHE_DIR $TRITON_CACHE_DIR" > {calls}.environment; {script}')
        ran = subprocess.run([copy, out], env=environment, capture_output=True, text=True)
        assert re.search(rf"{told}\d+ of \d+ s; in the log: what is left\n", ran.stdout), ran.stdout  # however busy the machine is
        finished = f"Not finished: autotune. The report names the shapes that have no row of max-autotune yet; STAGES=autotune bench/gpu.sh {out} goes"
        assert (finished in ran.stdout, ran.returncode, ran.stderr) == ((True, 0, "") if status == 75 else (False, 1, "Failed: autotune\n"))
    assert Path(f"{calls}.environment").read_text() == f"{tmp_path}/build/gpu-scratch/inductor /own\n"


@pytest.mark.parametrize(("stages", "seconds"), [("autotune", range(505, 521)), ("autotune train", range(11, 107))])
def test_max_autotune_as_the_last_stage_has_the_budget(tools, tmp_path, stages, seconds):
    stand_ins(tools, tmp_path / "calls")
    limits = tmp_path / "limits"
    tools("timeout", f'echo "$*" >> {limits}; while [[ $1 == -* ]]; do shift; done; shift; exec "$@"')
    assert run(tools, tmp_path / "out", STAGES=stages).returncode == 0
    (line,) = [line for line in limits.read_text().splitlines() if "--missing" in line]
    assert int(re.search(r"--kill-after=5 (\d+) ", line)[1]) in seconds


def test_a_backend_that_is_not_there_is_a_failure(tools, tmp_path):
    out = tmp_path / "out"
    stand_ins(tools, tmp_path / "calls")
    tools("python3", f'case "$*" in *available_backends*) exec {sys.executable} "$@";; esac')
    ran = run(tools, out, STAGES="train")
    assert ran.returncode == 1 and ran.stderr == "Failed: backends\n" and re.search(r"backends: FAILED with status 1 .*cuda: unavailable", ran.stdout)


def test_an_old_setuptools_is_named(tmp_path):
    (tmp_path / "setuptools/command").mkdir(parents=True)
    (tmp_path / "setuptools/__init__.py").write_text("__version__ = '75.1.0'\nCommand = Distribution = setup = object\n")
    (tmp_path / "setuptools/command/build.py").write_text("build = object\n")
    ran = subprocess.run([sys.executable, "setup.py"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert ran.returncode == 1 and "needs setuptools 77.0.3 or newer; this Python has 75.1.0" in ran.stderr


def test_a_stage_alone_and_a_step_that_fails(tools, tmp_path):
    calls, out = tmp_path / "calls", tmp_path / "out"
    stand_ins(tools, calls, compute_sanitizer='[[ $2 != racecheck ]] || { echo "a race"; exit 9; }')
    ran = run(tools, out, STAGES="sanitize")
    assert ran.returncode == 1 and ran.stderr == "Failed: racecheck\n"
    assert "racecheck: FAILED with status 9" in ran.stdout and "a race" in ran.stdout and "memcheck-tests: passed" in ran.stdout
    assert "bench/run.py" not in calls.read_text()
    (Path(tools.path) / "compute-sanitizer").unlink()
    calls.unlink()
    ran = run(tools, out, STAGES="sanitize core")
    assert "memcheck-tests: FAILED" in ran.stdout and "core: passed" in ran.stdout
    assert ran.stderr == "Failed: memcheck racecheck synccheck initcheck memcheck-tests\n"


@pytest.mark.proof
def test_its_python_runs_for_real(tools, tmp_path):
    """In small, on the CPU; what compiles or tests is written down alone."""
    calls, out = tmp_path / "calls", tmp_path / "out"
    stand_ins(tools, calls)
    tools("python3", f'case "$*" in *setup.py*|"-m pytest "*|*microbenchmarks/*) echo "python3 $*" >> {calls};; *) exec {sys.executable} "$@";; esac')
    tools.path = f"{tools.path}:{os.path.dirname(shutil.which('g++'))}"  # torch.compile calls it
    ran = run(tools, out, DEVICE="cpu", QUICK="1", PATIENCE="3")
    assert ran.returncode == 0, ran.stdout + ran.stderr + (out / "log.txt").read_text()[-3000:]
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "report.md", "rows.jsonl"]
    found, wanted = rows.read(out / "rows.jsonl"), {suite for each in SUITES for suite in each}
    assert {row["suite"] for row in found} == {*wanted, "nsight"} and wanted <= set(suites.NAMES)
    passed = {(row["suite"], row["provider"]) for row in found if row["gate"] == "passed"}
    assert passed >= {("decide", "library"), ("attention", "compile max-autotune"), ("layer", "expert addmm"), ("train", "ours"), ("step", "perfusion")}
    assert ("attention", "cuda without dependent launch") in {(row["suite"], row["provider"]) for row in found}
    layer = [row["provider"] for row in found if row["suite"] == "layer"]
    assert [layer.count(name) for name in ("sdpa math", "expert", "cuda", "compile max-autotune")] == [1, 2, 2, 1], "once in each step, or --missing"
    assert ("train", "ours compile") not in {(row["suite"], row["provider"]) for row in found}
    assert "ncu is not on PATH" in next(row["reason"] for row in found if row["suite"] == "nsight")
    report = (out / "report.md").read_text()
    assert all(f"**{suite}" in report for suite in (*wanted, "nsight"))
