"""The registry of compiled kernels in the CUDA library: no kernel is missing, and what it says of each is what ptxas said. The library is
the one that test_torch_library.py compiles; in Python the rows come from compiled_kernels()."""

import re
import subprocess
import sys
from collections import Counter

import pytest
import torch

from perfusion_kernels.cuda import OPERATORS

from ..cuda_host.build import ROOT
from ..kernels import cases
from .test_torch_library import ARCHITECTURES, compiled, facts  # noqa: F401, fixtures

ELEMENTS = {"perfusion::Half": "float16", "perfusion::BFloat16": "bfloat16", "float": "float32"}
PTXAS = re.compile(r"entry function '(\S+)' for '(\w+)'.*?(\d+) bytes stack.*?Used (\d+) registers", re.DOTALL)
SIXTEENS = ("keys", "query_rows")


@pytest.fixture(scope="module")
def table(facts):  # noqa: F811
    return facts["compiled"]["kernels"]


def numbers_of(tile):
    """{"head_dim": 40, "keys": 80} of "head_dim 40, keys 80"."""
    return {name: int(number) for name, number in re.findall(r"(\w+) (\d+)", tile)}


def test_the_table_is_what_ptxas_said(table, compiled):  # noqa: F811
    """Kernel for kernel, by the names that c++filt knows, whose template arguments the tiles name."""
    words = [found for file in compiled[0].parent.rglob("*.ptxas") for found in PTXAS.findall(file.read_text())]
    symbols = "\n".join(symbol for symbol, *_ in words)
    names = subprocess.run(["c++filt"], input=symbols, capture_output=True, text=True, check=True).stdout.splitlines()
    said = Counter()
    for name, (_, architecture, stack, registers) in zip(names, words, strict=True):
        kernel, element, *numbers = re.match(r"void perfusion::(\w+)_kernel<(.*?)>\(", name).expand(r"\1, \2").split(", ")
        said[kernel, ELEMENTS[element], tuple(map(int, numbers)), architecture, int(stack), int(registers)] += 1
    listed = Counter()
    for row in table:
        numbers = tuple(number // (16 if name in SIXTEENS else 1) for name, number in numbers_of(row["tile"]).items())
        listed[row["kernel"], row["dtype"], numbers, row["architecture"], row["stack"], row["registers"]] += 1
    assert listed == said and set(said.values()) == {1}


def test_every_kernel_is_there_for_every_architecture(table):
    rows = {(row["kernel"], row["dtype"], row["tile"], row["architecture"]) for row in table}
    machine_code = {each for each in ARCHITECTURES if each.startswith("sm_")}
    assert {(*kernel, architecture) for *kernel, _ in rows for architecture in machine_code} == rows
    assert set(OPERATORS) <= {kernel for kernel, *_ in rows}
    widths = {(row["dtype"], numbers_of(row["tile"])["head_dim"]) for row in table if row["kernel"] == "edited_attention"}
    assert widths == {(dtype, d) for dtype in ("float16", "bfloat16") for d in cases.WIDTHS}
    assert all(16 <= row["registers"] <= 255 and row["static_shared_memory"] == 0 for row in table)


def test_shared_memory_is_that_of_the_launch_plans(host, table):
    """Of the plan of a call for which this tile is taken; -1 by J, which Python has as None."""
    found = {}
    for row in table:
        assert found.setdefault((row["kernel"], row["tile"]), row["dynamic_shared_memory"]) == row["dynamic_shared_memory"]
    for (kernel, tile), size in found.items():
        assert size is None or 0 <= size <= 232448, (kernel, tile)
    host.configure(1)
    plain = cases.make(B=1, T=77, N=1024, H=1, d=40, D=11, J=1, dtype=torch.float16)
    plan = host.planned("edited_attention", dict(query=plain.query, key=plain.key, value=plain.value))
    assert found["edited_attention", f"head_dim 40, keys 80, query_rows {16 * plan['m']}"] == plan["bytes"]
    assert found["concept_gates", "resident 1"] is None


SPILLING = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9perfusion24edited_projection_kernelINS_8BFloat16ELi32ELi64EEEvv' for 'sm_90'
ptxas info    : Function properties for _ZN9perfusion24edited_projection_kernelINS_8BFloat16ELi32ELi64EEEvv
    16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 16 bytes cumulative stack size, 48 bytes smem, 400 bytes cmem[0]
"""


@pytest.mark.parametrize(
    ("words", "row"),
    [
        (SPILLING, '{"edited_projection", "rows 32, columns 64", "sm_90", PERFUSION_BFLOAT16, 96, 44, 16, 48,'),
        ("", "return 0;"),  # of PTX alone
    ],
)
def test_what_no_kernel_here_has_is_listed_too(tmp_path, words, row):
    (tmp_path / "a.cu.o.ptxas").write_text(words)
    command = [sys.executable, ROOT / "csrc/registry.py", tmp_path / "registry.cpp", tmp_path / "a.cu.o", tmp_path / "status.cpp.o"]
    subprocess.run(command, check=True)
    assert row in (tmp_path / "registry.cpp").read_text()
