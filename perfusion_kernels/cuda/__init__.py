"""The compiled CUDA kernels, as operators of torch; see csrc/ and setup.py for where they come from.

An operator's kernel is registered by the library itself (csrc/torch/<operator>.cpp). Here it gets its schema, and a function of
the operator's name in refusals.py, `<operator>_backward` where its derivatives are compiled too. Importing this loads
nothing: library.py says when that happens.
"""

import importlib

from ..backend import differentiated, register, register_backward
from ..choices import measured
from ..registration import Operator
from . import refusals
from .library import absent, unavailable  # noqa: F401  the backend's reason

OPERATORS = (
    "concept_gates", "edited_projection", "edited_attention", "fused_edited_attention", "cross_attention_layer"
)  # fmt: skip

# Compiled kernels that have to be asked for, and why: by name, or as "measured", where the table has a win of theirs (`WINS`). By
# default a compiled kernel runs where it replaces several launches of plain torch, and does not where it replaces a library's call.
DECLINED = {
    "edited_projection": "rows without a concept are promised the bits of the library's product;"
    ' backend="measured" takes this where it was measured to be faster than that'
}


def projection_wins(encodings, weight, *rest) -> bool:
    """J is not in the key, so that a row without a concept has the bits of a call in which no row has one."""
    return measured("edited_projection", encodings.device, encodings.dtype, (*encodings.shape, weight.shape[0])) == "cuda"


WINS = {"edited_projection": {"wins": projection_wins}}


def refuses(name: str):
    own = getattr(refusals, name)
    return lambda *arguments: refusals.anywhere(*arguments) or own(*arguments)


def declines(operator: Operator):
    """A call that will be differentiated is left to a backend that has kernels for that, if this one has none."""

    def declines(*arguments) -> str | None:
        if operator.name in DECLINED:
            return DECLINED[operator.name]
        elsewhere = bool(operator.backwards) and "cuda" not in operator.backwards
        if elsewhere and differentiated(arguments):
            return "its derivatives are not compiled, and others have kernels for them"
        return None

    return declines


def register_all() -> None:
    for name in OPERATORS:
        operator = importlib.import_module(f"..{name}", __name__).OPERATOR
        register("cuda", operator, None, refuses=refuses(name), declines=declines(operator), **WINS.get(name, {}))
        if hasattr(refusals, f"{name}_backward"):
            register_backward("cuda", operator, None, refuses=refuses(f"{name}_backward"))


if absent() is None:
    register_all()
