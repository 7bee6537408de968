"""The library as an inference backend in C++ would use it: configured, installed, found, linked, run; and no torch in it."""

import re
import subprocess

from ..cuda_host.build import ROOT

HEADER = (ROOT / "csrc/include/perfusion_kernels.h").read_text(encoding="utf-8")
EXPORTED = set(re.findall(r"^PERFUSION_API [^;(]*?(perfusion_\w+)\(", HEADER, re.MULTILINE))


def run(*command) -> str:
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def test_the_example_builds_and_runs_against_the_installed_library(tmp_path):
    built, installed, example = (tmp_path / name for name in ("built", "installed", "example"))
    out = run("cmake", "-S", ROOT, "-B", built, "-DPERFUSION_HOST=ON", "-DCMAKE_BUILD_TYPE=Debug")
    assert "the kernels are built for the CPU" in out
    run("cmake", "--build", built, "--parallel", "2")
    run("cmake", "--install", built, "--prefix", installed)
    run("cmake", "-S", ROOT / "csrc" / "example", "-B", example, f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", example)
    out = run(example / "example")
    assert out.startswith("0 compiled kernels: this library is built for the CPU\n") and "largest error" in out
    assert run(example / "sweep", "dense", "concept_gates") == "every case is right\n"
    libraries = run("ldd", next(installed.rglob("libperfusion_kernels.so")))
    assert "torch" not in libraries and "python" not in libraries
    symbols = run("nm", "-D", "--defined-only", "-C", next(installed.rglob("libperfusion_kernels.so")))
    exported = {line.split()[-1] for line in symbols.splitlines() if " T " in line}
    assert exported == EXPORTED and len(EXPORTED) > 10


def test_without_nvcc_it_configures_and_says_so(tmp_path):
    out = run("cmake", "-S", ROOT, "-B", tmp_path / "built", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert "no nvcc here, nothing to build or install" in out
