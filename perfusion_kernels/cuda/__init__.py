"""The compiled CUDA kernels, as operators of torch; see csrc/ and setup.py for where they come from.

An operator's kernel is registered by the library itself (csrc/torch/<operator>.cpp). Here it gets its schema, and a function of
the operator's name in supports.py, `<operator>_backward` where its derivatives are compiled too. Importing this loads
nothing: library.py says when that happens.
"""

import importlib

from ..backend import differentiated, register, register_backward
from ..registration import Operator
from . import supports
from .library import absent, unavailable  # noqa: F401  the backend's reason

OPERATORS = ("concept_gates", "edited_projection", "fused_edited_projection", "edited_attention", "fused_edited_attention")


def unsupported(name: str):
    own = getattr(supports, name)
    return lambda *arguments: supports.anywhere(*arguments) or own(*arguments)


def not_preferred(operator: Operator):
    """A call that will be differentiated is left to a backend that has kernels for that, if this one has none."""

    def not_preferred(*arguments) -> str | None:
        elsewhere = len(operator.backwards) > 0 and "cuda" not in operator.backwards
        if elsewhere and differentiated(arguments):
            return "its derivatives are not compiled, and others have kernels for them"
        return None

    return not_preferred


def register_all() -> None:
    for name in OPERATORS:
        operator = importlib.import_module(f"..{name}", __name__).OPERATOR
        register("cuda", operator, None, unsupported=unsupported(name), not_preferred=not_preferred(operator))
        if hasattr(supports, f"{name}_backward"):
            register_backward("cuda", operator, None, unsupported=unsupported(f"{name}_backward"))


if absent() is None:
    register_all()
