"""Cross-compiles Triton kernels by the package's own launches, without a GPU, and reads facts from the machine code.

Inside `compiling(target)` a launch compiles its kernel for `target` and runs nothing. Operators are called with tensors on
torch's meta device, so their own code chooses tiles and signatures, and neither is repeated here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from perfusion_kernels.triton import shared_memory

TARGETS = {
    **{f"CUDA {name}": GPUTarget("cuda", int(name.replace(".", "")), 32) for name in ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

KIB = {"CUDA 8.0": 163, "CUDA 8.6": 99, "CUDA 8.9": 99, "CUDA 9.0": 227, "CUDA 10.0": 227, "CUDA 12.0": 99, "gfx942": 64}
"""The largest shared memory of a program; CUDA C Programming Guide, "Technical specifications per compute capability"."""

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@contextmanager
def compiling(target: GPUTarget) -> Iterator[list[Any]]:
    """Inside the `with`, launches compile for `target` only; yields the compiled kernels, each once."""
    if not isinstance(triton.jit(_nothing), JITFunction):
        raise RuntimeError("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    found: dict[str, Any] = {}
    run, driver = JITFunction.run, triton.runtime.driver

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        found.setdefault(kernel.hash, kernel)
        return kernel

    before = driver._active
    names = [str(each) for each in TARGETS.values()]
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: names.index(str(target)),  # kernels are kept by device: one for each target
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
    )
    JITFunction.run, limit = compile_only, shared_memory.limit
    architecture = next(name for name, each in TARGETS.items() if each is target)
    shared_memory.limit = lambda device: KIB[architecture] * 1024 if target.backend == "cuda" else None
    kernels: list[Any] = []
    try:
        yield kernels
    finally:
        JITFunction.run, shared_memory.limit = run, limit
        driver._active = before
        kernels.extend(found.values())


def _nothing():
    pass


def facts(kernel: Any) -> dict[str, int]:
    """Registers per thread, bytes of local and of shared memory, and instructions counted in the machine code."""
    read = _of_cuda if kernel.metadata.target.backend == "cuda" else _of_amd
    return {"warps": kernel.metadata.num_warps, "shared_bytes": kernel.metadata.shared, **read(kernel)}


def _of_cuda(kernel: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = _output(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        code = _output(TOOLS / "nvdisasm", "--print-code", file.name)
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    count = _counter(code)
    return {
        "registers": registers,
        "local_bytes": stack + local,
        "spills": count(r"\b(?:STL|LDL)\b"),
        "matrix": count(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA|QGMMA|IMMA|DMMA|OMMA|QMMA)\b"),
        "loads_128": count(r"\b(?:LDG|LDGSTS)(?:\.\w+)*\.128\b"),
        "loads": count(r"\b(?:LDG|LDGSTS|UTMALDG)\b"),
    }


def _of_amd(kernel: Any) -> dict[str, int]:
    code = kernel.asm["amdgcn"]

    def stated(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    count = _counter(code)
    return {
        "registers": stated("vgpr_count"),
        "local_bytes": stated("private_segment_fixed_size"),
        "spills": stated("vgpr_spill_count"),  # scalar ones go to lanes of vector registers; if to memory, local_bytes shows it
        "matrix": count(r"\bv_mfma_"),
        "loads_128": count(r"\b(?:global|buffer)_load_dwordx4\b"),
        "loads": count(r"\b(?:global|buffer)_load_"),
    }


def _counter(code: str):
    return lambda pattern: len(re.findall(pattern, code))


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
