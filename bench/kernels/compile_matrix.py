"""What the Triton kernels become on each architecture: registers, memory and instructions. Table of docs/kernels-triton.md.

    PYTHONPATH=.:python python bench/kernels/compile_matrix.py                 # everything: an hour of one core, no GPU
    PYTHONPATH=.:python python bench/kernels/compile_matrix.py --quick         # every kernel in one form
    PYTHONPATH=.:python python bench/kernels/compile_matrix.py --only edited   # operators with this in their name

Operators are called at the shapes of Stable Diffusion 1.5 and XL, two rows of 77 tokens, with meta tensors; every kernel
that they launch is compiled and disassembled. Rows go to --rows as they come, one JSON object a line, and the table of
all rows to --page. Nothing is said about speed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from compile_only import TARGETS, compiling, facts

from perfusion_kernels.schemas import SCHEMAS

ROOT = Path(__file__).parents[2]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
B, T, D, S = 2, 77, 768, 16
LAYERS = {  # head_dim: N, C, H; SD 1.5's, and of SDXL the one with most instances
    40: (4096, 320, 8),
    64: (1024, 1280, 20),
    80: (1024, 640, 8),
    160: (256, 1280, 8),
}
PLACES = (0, 2, 8)
FEW = ("CUDA 9.0", "gfx942")  # where --quick compiles derivatives and absorbed layers


def calls(operator: str, d: int, J: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what, call) of the operator and of its derivatives, where they are kernels of its own."""
    module = importlib.import_module(f"perfusion_kernels.triton.{operator}")
    for form, arguments in arguments_of(operator, d, J, dtype):
        yield operator + form, lambda arguments=arguments: getattr(module, operator)(*arguments)
        backward = getattr(module, f"{operator}_backward", None)
        if backward is not None and form != ", absorbed":  # which refuses it
            gradients = results_of(operator, arguments)
            needs = [isinstance(argument, torch.Tensor) and argument.is_floating_point() for argument in arguments]
            all_arguments = (*gradients, *arguments, needs)
            yield f"{operator}{form}, backward", lambda arguments=all_arguments, backward=backward: backward(*arguments)


def arguments_of(operator: str, d: int, J: int, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(which form of the operator, arguments in the schema's order)."""
    N, C, H = LAYERS[d]
    O = H * d

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    wide = torch.float32
    key = {
        "encodings": tensor(B, T, D),
        **{name: tensor(S, D, dtype=wide) for name in ("targets", "metric_targets")},
        **{name: tensor(B, J, dtype=wide) for name in ("bias", "temperature")},
        **{name: tensor(B, T, J, dtype=wide) for name in ("gates", "components")},
        "index": tensor(B, J, dtype=torch.int32),
        "query": tensor(B, N, H, d),
        **{name: tensor(B, T, H, d) for name in ("key", "value")},
        **{name: tensor(O, D) for name in ("weight", "key_weight", "value_weight")},
        **{name: tensor(S, O) for name in ("outputs", "projected_targets", "key_outputs", "key_targets")},
        **{name: tensor(S, O) for name in ("value_outputs", "value_targets")},
        **{name: tensor(B, N, C) for name in ("hidden_states", "residual")},
        "query_weight": tensor(O, C),
        "output_weight": tensor(C, O),
        "output_bias": tensor(C),
        "scale": d**-0.5,
    }
    names = [argument.name for argument in torch._C.parse_schema(operator + SCHEMAS[operator]).arguments]
    if operator == "edited_attention" and J == 0:
        yield ", no edit", tuple(key[name] if name in ("query", "key", "value", "scale") else None for name in names)
        return
    yield "", tuple(key[name] for name in names)
    if operator == "cross_attention_layer":
        key |= {"key": tensor(B, T, H, C), "value": tensor(B, T, H, C), "query_weight": None, "output_weight": None}
        yield ", absorbed", tuple(key[name] for name in names)


def results_of(operator: str, arguments: tuple) -> tuple[torch.Tensor, ...]:
    result = getattr(getattr(torch.ops.perfusion_kernels, operator), "reference")(*arguments)
    return tuple(torch.empty_like(each) for each in (result if isinstance(result, tuple) else (result,)))


def combinations(operator: str, quick: bool) -> Iterator[tuple[int, int, str]]:
    """(head_dim, J, dtype) worth compiling: what does not depend on one of them gets one of it."""
    names = SCHEMAS[operator]
    if quick:
        yield 64, 2, "fp16"
        return
    for dtype in DTYPES:
        for d in LAYERS if " query" in names else (64,):
            for J in PLACES if " index" in names else (0,):
                yield d, J, dtype


def rows(operators: list[str], architectures: list[str], quick: bool) -> Iterator[dict]:
    """One per kernel, architecture and combination that gives another machine code."""
    for operator in operators:
        seen = set()
        for d, J, dtype in combinations(operator, quick):
            for what, call in calls(operator, d, J, DTYPES[dtype]):
                for architecture in architectures:
                    if quick and what != operator and architecture not in FEW:
                        continue
                    with compiling(TARGETS[architecture]) as kernels:
                        call()
                    for kernel in kernels:
                        if kernel.hash not in seen:
                            seen.add(kernel.hash)
                            case = {"operator": what, "kernel": kernel.metadata.name, "head_dim": d, "J": J, "dtype": dtype}
                            yield {**case, "architecture": architecture, **facts(kernel), "triton": triton.__version__}


COLUMNS = {
    "kernel": "kernel",
    "dtype": "dtype",
    "head_dim": "d",
    "J": "J",
    "architecture": "architecture",
    "warps": "warps",
    "registers": "registers",
    "spills": "spills",
    "local_bytes": "local bytes",
    "shared_bytes": "shared bytes",
    "matrix": "tensor-core",
    "loads_128": "128-bit loads",
    "loads": "loads",
}


def page(found: list[dict]) -> str:
    """The rows as a page, one table per operator."""
    version = ", ".join(sorted({row["triton"] for row in found}))
    lines = [
        "# The Triton kernels as compiled",
        "",
        "Written by `bench/kernels/compile_matrix.py`, from the machine code that triton " + version + " makes without a GPU at",
        f"the shapes of Stable Diffusion 1.5 and XL ({B} rows, T = {T}, D = {D}), with the tile sizes that an untuned",
        "installation takes. Per thread: registers. Per program: local memory (spilled registers and stack) and shared memory.",
        "Instructions are counted in the code, not as executed: spilling ones, tensor-core ones (on gfx942, matrix ones), loads",
        "from global memory and those of 128 bits among them. A kernel that another row has unchanged is left out.",
        "float32 is multiplied exactly, so not by tensor cores, unless `torch.backends.cuda.matmul.allow_tf32` is set.",
        "Nothing here says how fast a kernel is.",
    ]
    for operator in dict.fromkeys(row["operator"] for row in found):
        lines += ["", f"## {operator}", "", "| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
        for row in found:
            if row["operator"] == operator:
                lines.append("| " + " | ".join(str(row[column]).strip("_") for column in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def operators_here() -> list[str]:
    """Those that have a file of Triton kernels."""
    return [name for name in SCHEMAS if (ROOT / "perfusion_kernels/triton" / f"{name}.py").exists()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="head_dim 64, two concepts, float16")
    parser.add_argument("--only", default="", help="operators whose names contain this")
    parser.add_argument("--architectures", default=",".join(TARGETS), help="some of: " + ",".join(TARGETS))
    parser.add_argument("--rows", type=Path, default=ROOT / "bench/results/compile_matrix.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/kernels-triton.md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    operators = [name for name in operators_here() if options.only in name]
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    found = []
    with options.rows.open("w", encoding="utf-8") as file:
        for row in rows(operators, options.architectures.split(","), options.quick):
            found.append(row)
            print(json.dumps(row), file=file, flush=True)
            print(" ".join(str(value) for value in row.values()), flush=True)
    options.page.write_text(page(found), encoding="utf-8")
    print(f"{len(found)} rows in {options.rows}, table in {options.page}")


if __name__ == "__main__":
    main()
