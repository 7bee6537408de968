"""Triton kernels of the operators, for any GPU that Triton compiles for; each is compiled at its first call.

An operator's file has a function of the operator's name and `unsupported`; where derivatives have kernels, also
`<operator>_backward` and `unsupported_backward`, which take the arguments of their schemas. These may be in a file of their
own, `<operator>_backward.py`.
"""

import importlib
import importlib.util

from ..backend import register, register_backward
from .device import not_preferred

OPERATORS = ("concept_gates", "edited_projection", "fused_edited_projection", "edited_attention", "fused_edited_attention")

for _name in OPERATORS:
    _kernels = importlib.import_module(f".{_name}", __name__)
    _operator = importlib.import_module(f"..{_name}", __name__).OPERATOR
    register("triton", _operator, getattr(_kernels, _name), unsupported=_kernels.unsupported, not_preferred=not_preferred)
    if importlib.util.find_spec(f".{_name}_backward", __name__):
        _kernels = importlib.import_module(f".{_name}_backward", __name__)
    if _backward := getattr(_kernels, f"{_name}_backward", None):
        register_backward("triton", _operator, _backward, unsupported=_kernels.unsupported_backward)
del _name, _kernels, _operator, _backward
