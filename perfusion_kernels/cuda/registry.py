"""Reads the library's registry of compiled kernels: perfusion_compiled_kernels of csrc/include/perfusion_kernels.h.

By ctypes rather than a Python extension, because the library has no Python symbols: one binary serves every Python.
"""

import ctypes

DTYPES = ("float16", "bfloat16", "float32", "int32")  # in the order of perfusion_dtype
TEXTS = ("kernel", "tile", "architecture")
NUMBERS = ("dtype", "registers", "spills", "stack", "static_shared_memory", "dynamic_shared_memory")


class CompiledKernel(ctypes.Structure):
    """The struct perfusion_compiled_kernel."""

    _fields_ = [(name, ctypes.c_char_p) for name in TEXTS] + [(name, ctypes.c_int32) for name in NUMBERS]


def kernels(library: ctypes.CDLL) -> list[dict]:
    """The table's rows; dtype as its name, and None for what depends on J. AttributeError from a library that has no table."""
    read = library.perfusion_compiled_kernels
    read.restype, read.argtypes = ctypes.c_int64, [ctypes.POINTER(ctypes.POINTER(CompiledKernel))]
    first = ctypes.POINTER(CompiledKernel)()
    return [_row(first[i]) for i in range(read(ctypes.byref(first)))]


def _row(kernel: CompiledKernel) -> dict:
    row = {name: getattr(kernel, name).decode() for name in TEXTS} | {name: getattr(kernel, name) for name in NUMBERS}
    row["dtype"] = DTYPES[row["dtype"]]
    if row["dynamic_shared_memory"] < 0:
        row["dynamic_shared_memory"] = None
    return row
