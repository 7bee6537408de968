"""bench/microbenchmarks: their product, run on the CPU, is right; all of them compile for a GPU; the suite that calls them names what they export."""

import ctypes
import re
import shutil
import subprocess

import pytest
import torch

from bench import microbenchmarks
from tests.cuda_host.build import FLAGS, ROOT

pytestmark = pytest.mark.bench

HOST = ("status.cpp", "host/block.cpp", "host/cache.cpp", "host/copies.cpp", "host/fiber.cpp", "host/warp.cpp")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """matrix_rate.cu for the CPU, as csrc/ is built there."""
    file = tmp_path_factory.mktemp("micro") / "host.so"
    sources = [microbenchmarks.FOLDER / "matrix_rate.cu", *(ROOT / "csrc" / name for name in HOST)]
    subprocess.run(["g++", *FLAGS, "-shared", "-o", file, "-x", "c++", *sources], check=True)
    return ctypes.CDLL(str(file))


@pytest.mark.parametrize("tile", [(128, 64), (128, 128), (256, 128)])
@pytest.mark.parametrize("K", [32, 160])
def test_the_product_is_right(library, tile, K):
    """With fewer steps than stages, and with more; of bfloat16 factors, float32 sums and one rounding."""
    M, N = 512, 128
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, K, generator=draw).bfloat16() for rows in (M, N))
    c = torch.full((M, N), float("nan"), dtype=torch.bfloat16)
    assert library.multiply_matrices(*(ctypes.c_void_p(x.data_ptr()) for x in (a, b, c)), M, N, K, *tile, None) == 0
    exact = a.double() @ b.double().T
    scale = a.double().abs() @ b.double().abs().T  # of the sums
    assert ((c.double() - exact).abs() <= 2**-8 * exact.abs() + K * 2**-24 * scale).all()


def test_wrong_sizes_are_refused(library):
    assert library.multiply_matrices(None, None, None, 100, 128, 32, 128, 128, None) == 1
    assert library.multiply_matrices(None, None, None, 128, 128, 32, 64, 64, None) == 2


def test_the_issue_loop_counts(library):
    sums = torch.zeros(2 * 256)
    assert library.issue_products(ctypes.c_void_p(sums.data_ptr()), 2, 3, None) == 0
    assert sums.unique().tolist() == [512.0 * 3]


@pytest.mark.proof
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_they_compile_and_export_what_the_suite_calls(tmp_path):
    file = microbenchmarks.build(tmp_path, "9.0")
    symbols = subprocess.run(["nm", "-D", "--defined-only", file], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in symbols.splitlines() if " T " in line}
    called = set(re.findall(r'launch\("(\w+)"', (ROOT / "bench/suites/decide.py").read_text()))
    assert called <= exported and called == {"read_repeatedly", "issue_products", "multiply_matrices", "launch_once"}
    assert file.name == microbenchmarks.LIBRARY and not list(tmp_path.glob("*.part"))


def test_without_nvcc_or_library_there_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDACXX", raising=False)
    with pytest.raises(RuntimeError, match="no nvcc on PATH"):
        microbenchmarks.build(tmp_path, "9.0")
    monkeypatch.setenv("MICROBENCHMARKS", str(tmp_path / "none.so"))
    with pytest.raises(RuntimeError, match="not compiled"):
        microbenchmarks.load.__wrapped__()
