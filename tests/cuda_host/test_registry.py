"""The registry of compiled kernels, bound by pybind11 from the table that is linked into the CUDA library: no kernel is missing, and what
it says of each is what ptxas and the launch plans say. The table is of the library that test_torch_library.py looks at."""

import re
import subprocess
import sys
from collections import Counter

import pytest
import torch

from perfusion_kernels.cuda import OPERATORS
from perfusion_kernels.cuda.registry import DTYPES

from ..kernels import cases
from .build import ROOT, build_registry
from .test_torch_library import compiled, facts  # noqa: F401, fixtures

ELEMENTS = {"perfusion::Half": "float16", "perfusion::BFloat16": "bfloat16", "float": "float32"}
PTXAS = re.compile(r"entry function '(\S+)' for '(\w+)'.*?(\d+) bytes stack.*?Used (\d+) registers", re.DOTALL)
WIDTHS, ARCHITECTURES = (32, 40, 64, 80, 96, 128, 160), ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@pytest.fixture(scope="module")
def table(compiled, tmp_path_factory):  # noqa: F811
    module = build_registry(compiled[0].parent / "registry.cpp", tmp_path_factory.mktemp("registry"))
    return module.compiled_kernels()


@pytest.fixture(scope="module")
def words(compiled):  # noqa: F811
    """Mangled name, architecture, stack and registers of every kernel that ptxas spoke of."""
    return [found for file in compiled[0].parent.rglob("*.ptxas") for found in PTXAS.findall(file.read_text())]


def numbers_of(tile):
    """{"head_dim": 40, "keys": 80} of "head_dim 40, keys 80"."""
    return {name: int(number) for name, number in re.findall(r"(\w+) (\d+)", tile)}


def test_the_table_is_what_ptxas_said(table, words):
    """Kernel for kernel, by the names that c++filt knows, whose template arguments the tiles name."""
    symbols = "\n".join(symbol for symbol, *_ in words)
    names = subprocess.run(["c++filt"], input=symbols, capture_output=True, text=True, check=True).stdout.splitlines()
    said = Counter()
    for name, (_, architecture, stack, registers) in zip(names, words, strict=True):
        kernel, element, *numbers = re.match(r"void perfusion::(\w+)_kernel<(.*?)>\(", name).expand(r"\1, \2").split(", ")
        said[kernel, ELEMENTS[element], tuple(map(int, numbers)), architecture, int(stack), int(registers)] += 1
    listed = Counter()
    for row in table:
        assert row.tile == ", ".join(f"{name} {number}" for name, number in numbers_of(row.tile).items())
        numbers = tuple(number // (16 if name == "keys" else 1) for name, number in numbers_of(row.tile).items())
        listed[row.kernel, DTYPES[row.dtype], numbers, row.architecture, row.stack, row.registers] += 1
    assert listed == said and set(said.values()) == {1}


def test_every_kernel_is_there_for_every_architecture(table):
    rows = {(row.kernel, DTYPES[row.dtype], row.tile, row.architecture) for row in table}
    assert {architecture for *_, architecture in rows} == set(ARCHITECTURES)
    assert {(*kernel, architecture) for *kernel, _ in rows for architecture in ARCHITECTURES} == rows
    for dtype in ("float16", "bfloat16"):
        for keys in (80, 160, 256):
            assert all(("edited_attention", dtype, f"head_dim {d}, keys {keys}", "sm_80") in rows for d in WIDTHS)
    assert set(OPERATORS) <= {kernel for kernel, *_ in rows}
    assert all(16 <= row.registers <= 255 and row.spills == row.stack == row.static_shared_memory == 0 for row in table)


@pytest.fixture
def shared_memory(table):
    """Dynamic shared memory in the table, by kernel and tile: the same for every dtype and architecture."""
    found = {}
    for row in table:
        assert found.setdefault((row.kernel, row.tile), row.dynamic_shared_memory) == row.dynamic_shared_memory
    return found


def attention_plan(host, kernel, head_dim, keys):
    arguments = cases.make(B=1, T=keys, N=129, H=1, d=head_dim, D=11, J=1, dtype=torch.float16).arguments(kernel)
    plain = ("query", "key", "value", "encodings", "key_weight", "value_weight")
    plan = {"edited_attention": host.plan, "fused_edited_attention": host.fused_plan}[kernel]
    host.configure(1)
    return plan(**{name: tensor for name, tensor in arguments.items() if name in plain})["bytes"]


def projection_plan(host, kernel, rows, columns):
    host.configure({(80, 128): 1, (80, 64): 3, (32, 64): 100}[rows, columns])
    plan = host.plan_projection(encodings=torch.empty(1, 160, 8).half(), weight=torch.empty(128, 8).half())
    assert (plan["rows"], plan["columns"]) == (rows, columns)
    return plan["bytes"]


@pytest.mark.parametrize(
    "operator, plan, tiles",
    [
        ("edited_attention", attention_plan, 7 * 3),
        ("fused_edited_attention", attention_plan, 7 * 2),
        ("edited_projection", projection_plan, 3),
    ],
)
def test_shared_memory_is_that_of_the_plans(host, shared_memory, operator, plan, tiles):
    """Of the plan that the host library makes of a call without an edit for which this tile is taken."""
    listed = {key: size for key, size in shared_memory.items() if key[0].startswith(operator)}
    assert listed == {(kernel, tile): plan(host, kernel, **numbers_of(tile)) for kernel, tile in listed}
    assert len(listed) == tiles


def test_shared_memory_of_one_size_is_that_of_the_launches(built, shared_memory):
    sizes = {kernel: size for (kernel, tile), size in shared_memory.items() if tile == ""}
    assert sizes == {**built.shared_memory, "sum_of_splits": 0}


def test_shared_memory_of_gates(built, shared_memory):
    sizes = {tile: size for (kernel, tile), size in shared_memory.items() if kernel == "concept_gates"}
    assert sizes == {"resident 1": -1, "resident 0": built.gate_slices_bytes}  # -1: by J


def test_python_reads_the_same_table(table, facts):  # noqa: F811
    """compiled_kernels(), by ctypes out of the library itself."""
    names = ("kernel", "tile", "architecture", "registers", "spills", "stack", "static_shared_memory")
    bound = [{name: getattr(row, name) for name in names} for row in table]
    for row, of_table in zip(bound, table):
        row["dtype"], size = DTYPES[of_table.dtype], of_table.dynamic_shared_memory
        row["dynamic_shared_memory"] = None if size < 0 else size
    assert facts["compiled"]["kernels"] == bound and len(bound) > 0


SPILLING = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9perfusion24edited_projection_kernelINS_8BFloat16ELi32ELi64EEEvv' for 'sm_90'
ptxas info    : Function properties for _ZN9perfusion24edited_projection_kernelINS_8BFloat16ELi32ELi64EEEvv
    16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 16 bytes cumulative stack size, 48 bytes smem, 400 bytes cmem[0]
"""


def written(folder, words):
    """The bound table of a library of one object with a kernel file, of which ptxas said this, and of one without."""
    (folder / "a.cu.o.ptxas").write_text(words)
    script, registry = ROOT / "csrc" / "registry.py", folder / "registry.cpp"
    subprocess.run([sys.executable, script, registry, folder / "a.cu.o", folder / "status.cpp.o"], check=True)
    return build_registry(registry, folder).compiled_kernels()


def test_what_no_kernel_here_has_is_listed_too(tmp_path):
    (row,) = written(tmp_path, SPILLING)
    assert (row.kernel, DTYPES[row.dtype], row.tile, row.architecture) == ("edited_projection", "bfloat16", "rows 32, columns 64", "sm_90")
    assert (row.registers, row.spills, row.stack, row.static_shared_memory) == (96, 44, 16, 48)


def test_a_library_of_ptx_alone_lists_nothing(tmp_path):
    assert written(tmp_path, "") == []
