"""A kernel compiled for every architecture without a GPU, by Triton and, where there is nvcc, from csrc/. All of them: `make proof`."""

import json
import re
import shutil
import subprocess

import pytest

from .test_compile_matrix import ARCHITECTURES, ROOT, run

CUDA = re.search(r"set\(list ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())[1].replace("+PTX", "").split()


def test_triton_compiles_an_operator_for_every_architecture(tmp_path):
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    script = str(ROOT / "bench/kernels/compile_matrix.py")
    run(tmp_path, script, "--quick", "--only", "concept_gates", "--rows", str(rows), "--page", str(page))
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["architecture"] for row in found} == ARCHITECTURES
    assert not [row for row in found if row["spills"] or row["local_bytes"]]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", CUDA)
def test_nvcc_compiles_a_kernel(architecture, tmp_path):
    """The smallest that has all of the device layer: asynchronous copies, matrix loads and products, wide stores."""
    target = f"-arch=sm_{architecture.replace('.', '')}"
    kernel = "edited_projection_kernel<perfusion::Half, 32, 64>(PERFUSION_CONSTANT perfusion::EditedProjectionLaunch)"
    (tmp_path / "one.cu").write_text(f'#include "{ROOT}/csrc/edited_projection.cuh"\ntemplate __global__ void perfusion::{kernel};\n')
    command = ["nvcc", "-std=c++17", target, "-Xptxas=-v", "-cubin", tmp_path / "one.cu", "-o", tmp_path / "one.cubin"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    words = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ran.stderr)
    assert words and {int(number) for each in words for number in each} == {0}
