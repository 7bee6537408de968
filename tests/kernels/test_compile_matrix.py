"""Without a GPU, Triton compiles every kernel for every architecture; what came of it is read from the machine code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from perfusion_kernels.schemas import SCHEMAS

ROOT = Path(__file__).parents[2]
WITHOUT_PRODUCTS = {"_concept_gates", "_products", "_update", "_gradients", "_sum_by_slot"}  # their sums stay in float32
ARCHITECTURES = {"CUDA 8.0", "CUDA 8.6", "CUDA 8.9", "CUDA 9.0", "CUDA 10.0", "CUDA 12.0", "gfx942"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The rows of a quick run and its page; in a process of its own, because here Triton interprets."""
    folder = tmp_path_factory.mktemp("compiled")
    rows, page = folder / "rows.jsonl", folder / "page.md"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_CACHE_DIR": str(folder / "cache")}
    script = ROOT / "bench/kernels/compile_matrix.py"
    command = [sys.executable, str(script), "--quick", "--rows", str(rows), "--page", str(page)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return [json.loads(line) for line in rows.read_text().splitlines()], page.read_text()


def test_every_operator_compiles_for_every_architecture(compiled):
    rows, _ = compiled
    for operator in SCHEMAS:
        assert {row["architecture"] for row in rows if row["operator"] == operator} == ARCHITECTURES, operator


def test_nothing_spills(compiled):
    rows, _ = compiled
    wrong = [row for row in rows if row["spills"] or row["local_bytes"]]
    assert rows and not wrong


def test_products_use_tensor_cores_and_wide_loads(compiled):
    """In float16, every kernel but those whose products need float32."""
    rows, _ = compiled
    with_products = [row for row in rows if row["kernel"] not in WITHOUT_PRODUCTS]
    assert len({row["kernel"] for row in with_products}) >= 6
    wrong = [row for row in with_products if not (row["matrix"] and row["loads_128"])]
    assert {row["dtype"] for row in rows} == {"fp16"} and not wrong


def test_registers_and_shared_memory_are_within_limits(compiled):
    """255 registers per thread; 99 KiB of shared memory is what every listed NVIDIA architecture has."""
    rows, _ = compiled
    for row in rows:
        assert 0 < row["registers"] <= (512 if row["architecture"] == "gfx942" else 255), row
        assert row["shared_bytes"] <= (64 if row["architecture"] == "gfx942" else 99) * 1024, row


def test_the_page_shows_every_row(compiled):
    rows, page = compiled
    assert sum(line.startswith("| ") and not line.startswith("| kernel") for line in page.splitlines()) == len(rows)
    for operator in SCHEMAS:
        assert f"\n## {operator}\n" in page
