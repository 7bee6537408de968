"""The C API from Python, by what csrc/include/perfusion_kernels.h says: its params structs, and the letters of their tensors' shapes."""

import ctypes
import re

import torch
from torch import Tensor

from .build import ROOT

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.int32: 3}
HEADER = (ROOT / "csrc/include/perfusion_kernels.h").read_text(encoding="utf-8")
SHARED = {"fused_edited_projection": "edited_projection"}  # operator -> whose params it takes


class Refused(RuntimeError):
    """A status other than OK, with its message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class View(ctypes.Structure):
    """perfusion_tensor."""

    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("strides", ctypes.c_int64 * 4)]


KINDS = {"int64_t ": ctypes.c_int64, "perfusion_tensor ": View, "void *": ctypes.c_void_p, "float ": ctypes.c_float}


def _structs() -> tuple[dict[str, type], dict[str, dict[str, list[str]]]]:
    """By operator: the struct, and the letters of each tensor."""
    structs, letters = {}, {}
    for operator, body in re.findall(r"typedef struct perfusion_(\w+)_params \{\n(.*?)\}", HEADER, re.DOTALL):
        fields, letters[operator] = [], {}
        for kind, names, shape in re.findall(r"^  (\w+ \*?)([\w, ]+);(?: +/\* \[([^\]]*)\])?", body, re.MULTILINE):
            fields += [(name, KINDS[kind]) for name in names.split(", ")]
            if shape:
                letters[operator][names] = shape.split(", ")
        structs[operator] = type(f"perfusion_{operator}_params", (ctypes.Structure,), {"_fields_": fields})
    return structs, letters


STRUCTS, LETTERS = _structs()


def params(operator: str, tensors: dict[str, Tensor | None], **numbers) -> ctypes.Structure:
    """numbers: sizes that no tensor has, the scale, the workspace."""
    operator = SHARED.get(operator, operator)
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    result = STRUCTS[operator]()
    sizes = {}
    for name, letters in LETTERS[operator].items():
        if name in given:
            tensor = given[name]
            for letter, size in zip(letters, tensor.shape):
                sizes.setdefault(letter, size)
            strides = (ctypes.c_int64 * 4)(*tensor.stride())
            setattr(result, name, View(tensor.data_ptr(), DTYPES[tensor.dtype], strides))
    if "slots" in given:
        sizes["P"] = given["key"].shape[0]
    for name, number in {**sizes, **numbers}.items():
        if hasattr(result, name):
            setattr(result, name, number)
    return result


class CApi:
    """One library; its functions by the operators' names."""

    def __init__(self, path: str):
        self.library = ctypes.CDLL(path)
        self.library.perfusion_last_message.restype = ctypes.c_char_p

    def __call__(self, function: str, struct: ctypes.Structure, second: object = None) -> None:
        status = getattr(self.library, f"perfusion_{function}")(ctypes.byref(struct), second)
        if status:
            raise Refused(status, self.library.perfusion_last_message().decode())

    def workspace_bytes(self, operator: str, tensors: dict[str, Tensor | None]) -> int:
        count = ctypes.c_int64(-1)
        self(f"{operator}_workspace", params(operator, tensors), ctypes.byref(count))
        return count.value
