"""Generates the registry of compiled kernels as C++: architecture, registers, spills and shared memory of each.

    python csrc/registry.py REGISTRY.cpp OBJECT…

CMake runs it after the objects are compiled. ptxas's reports, which keep_ptxas.sh writes beside nvcc's objects, have everything but
the dynamic shared memory, which limits.cu computes. C++ and Python read the table with perfusion_compiled_kernels of
include/perfusion_kernels.h.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

DTYPES = {"NS_4HalfE": "float16", "NS_8BFloat16E": "bfloat16", "f": "float32"}  # by the mangled name of a kernel's first template argument
SIXTEENS = ("keys", "query_rows")  # which are counted in groups of 16
TILES = {  # names of the other template arguments
    "concept_gates": ("resident",),
    "edited_attention": ("head_dim", "keys", "query_rows"),
    "fused_edited_attention": ("head_dim", "keys"),
    "edited_projection": ("rows", "columns"),
    "fused_edited_projection": ("rows", "columns"),
    "encodings_gradient": (),
    "sum_of_splits": (),
    "coefficients_gradient": (),
    "tables_gradient": (),
}


def kernels(objects: Iterable[Path]) -> list[dict]:
    """ptxas's report for these objects: one row for each kernel and architecture, by kernel, tile, dtype and architecture.

    kernel, dtype, arguments (the numbers among its template arguments), architecture ("sm_80"), registers, and bytes: spills, those
    stored and loaded; stack, of local memory; shared, the static shared memory.
    """
    rows = []
    for file in (Path(f"{each}.ptxas") for each in objects if str(each).endswith(".cu.o")):
        for part in file.read_text(encoding="utf-8").split("Compiling entry function ")[1:]:
            symbol, architecture = re.match(r"'(\S+)' for '(\w+)'", part).groups()
            kernel, dtype, arguments = named(symbol)
            local = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
            stack, stores, loads = map(int, re.search(local, part).groups())
            registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
            row = dict(kernel=kernel, dtype=dtype, arguments=arguments, architecture=architecture, registers=int(registers[1]))
            rows.append(dict(**row, spills=stores + loads, stack=stack, shared=int(shared[1]) if shared else 0))
    return sorted(rows, key=lambda row: (row["kernel"], row["arguments"], row["dtype"], row["architecture"]))


def named(symbol: str) -> tuple[str, str, tuple[int, ...]]:
    """Kernel, dtype and numbers decoded from a mangled name; of edited_attention_kernel<Half, 40, 5>: edited_attention, float16, (40, 5).

    Raises ValueError for a kernel that is not in TILES, or has other template arguments than TILES lists.
    """
    match = re.match(rf"_ZN9perfusion\d+(\w+?)_kernelI({'|'.join(DTYPES)})((?:L[a-z]\d+E)*)EE", symbol)
    kernel, dtype, literals = match.groups() if match else (None, None, "")
    arguments = tuple(map(int, re.findall(r"L[a-z](\d+)E", literals)))
    if kernel not in TILES or len(TILES[kernel]) != len(arguments):
        rule = "TILES of csrc/registry.py must name each kernel, and each number among its template arguments after the dtype"
        raise ValueError(f"{rule}; got {symbol}. Add it there, and its shared memory to csrc/limits.cu")
    return kernel, DTYPES[dtype], arguments


def tile(kernel: str, arguments: tuple[int, ...]) -> str:
    """The numbers by name: "head_dim 40, keys 80"."""
    return ", ".join(f"{name} {16 * number if name in SIXTEENS else number}" for name, number in zip(TILES[kernel], arguments))


def source(rows: Iterable[dict]) -> str:
    """The rows as the table of a C++ file."""
    lines = []
    for row in rows:
        kernel, arguments = row["kernel"], row["arguments"]
        texts = ", ".join(f'"{text}"' for text in (kernel, tile(kernel, arguments), row["architecture"]))
        numbers = ", ".join(str(row[name]) for name in ("registers", "spills", "stack", "shared"))
        dynamic = f'perfusion::shared_memory_of("{kernel}", {{{", ".join(map(str, arguments))}}})'
        lines.append(f"    {{{texts}, PERFUSION_{row['dtype'].upper()}, {numbers}, {dynamic}}},\n")
    return f"""\
// Written by csrc/registry.py from ptxas's reports.
#include "perfusion_kernels.h"
#include "../limits.h"

static const perfusion_compiled_kernel registry[] = {{
{"".join(lines)}    {{}},  // not counted: an array needs an element, and PTX alone gives no row
}};

extern "C" int64_t perfusion_compiled_kernels(const perfusion_compiled_kernel** kernels) {{
  *kernels = registry;
  return {len(lines)};
}}
"""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(source(kernels(map(Path, sys.argv[2:]))), encoding="utf-8")
