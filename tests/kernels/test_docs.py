"""The page on adding an operator is a program: its Triton kernel runs interpreted, its CUDA source compiled for the CPU, and nvcc takes it."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from perfusion_kernels.cuda import OPERATORS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add-an-operator.md").read_text(encoding="utf-8")
END = "#ifdef __cplusplus\n}\n#endif\n"  # of the C API's header
CALL = """
torch.ops.load_library({library!r})
table = torch.randn(7, 133)[:, ::2]
torch.testing.assert_close(torch.ops.perfusion_kernels.concept_energies.cuda(table, table), table.square().sum(-1))
try:
    torch.ops.perfusion_kernels.concept_energies.cuda(table, table.half())
except RuntimeError as error:
    assert "concept_energies: metric_targets must be float32; got float16" in str(error), error
else:
    raise AssertionError("a wrong dtype was taken")
"""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def run(*command, **options):
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """csrc/ with the page's files in it."""
    folder = tmp_path_factory.mktemp("page") / "csrc"
    shutil.copytree(ROOT / "csrc", folder)
    header = folder / "include/perfusion_kernels.h"
    (declarations,) = blocks("c")
    before, after = header.read_text().rsplit(END, 1)
    header.write_text(before + declarations + END + after)
    for code in blocks("cpp"):
        name = re.match(r"// csrc/(\S+)\n", code)[1]
        assert not (folder / name).exists()
        (folder / name).write_text(code)
    return folder


@pytest.fixture(scope="module")
def library(sources):
    torch_folder = Path(torch.__file__).parent
    files = [sources / "concept_energies.cu", *(sources / "torch" / f"{name}.cpp" for name in ("concept_energies", "library"))]
    files += [sources / "status.cpp", *(path for path in sorted((sources / "host").glob("*.cpp")) if path.name != "registry.cpp")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-DPERFUSION_HOST", '-DPERFUSION_OVERLOAD="cuda"', "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    torch_flags = ["-isystem", torch_folder / "include", f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    run("g++", *flags, "-x", "c++", *files, "-x", "none", *torch_flags, "-Wl,-Bsymbolic", "-o", sources / "page.so")
    return sources / "page.so"


@pytest.mark.docs
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_page_runs(library, tmp_path):
    program = tmp_path / "page.py"  # a file, because Triton reads a kernel's source
    program.write_text("\n".join([*blocks("python"), CALL.format(library=str(library))]))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_INTERPRET": "1"}
    run(sys.executable, program, env=environment)


@pytest.mark.docs
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_compiles_the_page(sources):
    run("nvcc", "-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", "-c", sources / "concept_energies.cu", "-o", sources / "page.o")


def test_every_place_is_there():
    """Each file of the table, with the name of an operator or of its suite in it; a file of the operator's own has it in its path."""
    rows = [line.split("|")[1] for line in PAGE.split("## Every place")[1].splitlines() if line.startswith("| `")]
    places = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(places) > 45
    for place in places:
        files = [ROOT / place.replace("OPERATOR", name) for name in OPERATORS]
        assert any(file.exists() for file in files), place
        if "OPERATOR" not in place and place not in NOT_NAMED:
            assert re.search(NAMES, files[0].read_text(encoding="utf-8")), place
    known = {place.replace("OPERATOR", name) for place in places for name in OPERATORS}
    for name in OPERATORS:
        others = {file for file in files_of(name) if file not in known}
        assert not others, sorted(others)
    # a file that names four of the five operators is a place, too, and one that names three suites
    most = {file for file, names in Counter(file for name in OPERATORS for file in naming(name)).items() if names >= 4}
    most |= {file for file, names in Counter(file for name in SUITES for file in naming_suite(name)).items() if names >= len(SUITES)}
    assert most <= known | NO_PLACES, sorted(most - known - NO_PLACES)


SUITES = ("gates", "fused", "projection")
NAMES = "|".join([*OPERATORS, *(rf"--suite {name}" for name in SUITES)])
NOT_NAMED = ("bench/kernels/nvcc_matrix.py", "bench/kernels/compile_matrix.py", "bench/suites/__init__.py", "python/perfusion/cli/doctor.py")
NO_PLACES = {
    *("bench/predictions.jsonl", "bench/results/compile_matrix.jsonl"),  # generated
    *("perfusion_kernels/fused_edited_attention.py", "python/perfusion/engine.py", "tests/perfusion/test_engine.py"),  # which use others
}


def files_of(operator):
    """Those that have the operator's name, or that of its derivatives, and not a longer one."""
    listed = subprocess.run(["git", "ls-files", f"*{operator}*"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    return [file for file in listed if re.fullmatch(rf"(test_)?{operator}(_backward)?", Path(file).stem) and not file.endswith(".md")]


def naming_suite(suite):
    pattern = rf'(--suite |"){suite}("|\b[^_.])'
    found = subprocess.run(["git", "grep", "-lE", pattern, "--", "bench", "tests/bench", ":!*.jsonl"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.split()


def naming(operator):
    """Files with the whole name of an operator in them."""
    found = subprocess.run(["git", "grep", "-lwF", operator, "--", ":!docs", ":!*.md", "."], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.split()
