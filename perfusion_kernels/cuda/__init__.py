"""The compiled CUDA kernels, as operators of torch; see csrc/ and setup.py for where they come from.

The library registers an operator's kernel itself (csrc/torch/<operator>.cpp). Here the operator gets its schema, and supports.py has
a predicate of its name, and `<operator>_backward` where its derivatives are compiled too. Importing this module does not load
the library; library.py loads it at first use.
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
    """A call that will be differentiated is not preferred here if only another backend has kernels for the derivatives."""

    def not_preferred(*arguments) -> str | None:
        elsewhere = len(operator.backwards) > 0 and "cuda" not in operator.backwards
        if elsewhere and differentiated(arguments):
            return "its derivatives are not compiled, and another backend has kernels for them"
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
