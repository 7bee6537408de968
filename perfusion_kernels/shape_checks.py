"""Checks that need no values: types, dtypes, devices, shapes."""

from collections.abc import Callable, Sequence
from functools import wraps
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn import Parameter

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDE = (torch.float32, torch.float64)
INDEX = (torch.int32,)


def dtypes_beside(tensor: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes of an argument that must match `tensor`: the same dtype, or any floating one under autocast, which casts both."""
    return FLOATING if autocasts(tensor) else (tensor.dtype,)


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; some, as "meta", have none."""
    if tensor.is_cpu:
        return torch.is_autocast_enabled("cpu")
    device_type = tensor.device.type
    # torch.compile cannot trace is_autocast_available before torch 2.12; every device that it compiles for has autocast
    known = device_type != "meta" and (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type))
    return known and torch.is_autocast_enabled(device_type)


_NONE = type(None)
_PLAIN = frozenset((Tensor, Parameter, _NONE))
_shape, _dtype, _device = map(attrgetter, ("shape", "dtype", "device"))

REMEMBERED = 4096
"""Capacity of the cache of `once`: more combinations of shapes, dtypes and devices than a server sees, a few megabytes at most."""


def once(check: Callable[..., None]) -> Callable[..., None]:
    """Caches `check` by shapes, dtypes and devices: a combination that passed is not checked again.

    check: a function of tensors and Nones, which looks at their dtypes, devices and shapes, at whether autocast is
        on, and at nothing else.
    """
    passed: set[tuple] = set()

    @wraps(check)
    def run(*arguments: Tensor | None) -> None:
        kinds = tuple(map(type, arguments))
        # traced code checks once anyway, and a cache lookup would become a guard; a subclass may have symbolic sizes
        if torch.compiler.is_compiling() or not _PLAIN.issuperset(kinds) or arguments[0] is None:
            return check(*arguments)
        tensors = arguments if _NONE not in kinds else [x for x in arguments if x is not None]
        key = (kinds, autocasts(arguments[0]), *map(_shape, tensors), *map(_dtype, tensors), *map(_device, tensors))
        if key not in passed:
            check(*arguments)
            if len(passed) >= REMEMBERED:
                passed.clear()
            passed.add(key)

    return run


class Arguments:
    """Checks one call's tensors in order; shape letters keep the size of their first appearance.

    The error names the operator, the argument, the rule and what came.
    """

    def __init__(self, operator: str):
        self.operator = operator
        self.sizes: dict[str, int] = {}
        self.origins: dict[str, str] = {}
        self.device: torch.device | None = None

    def __call__(self, name: str, tensor: Tensor, letters: str, dtypes: Sequence[torch.dtype], why: str = "") -> None:
        """`letters`: one per dimension, as in "B T D"; "H*d" is a product of letters seen before."""
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.operator}: {name} must be a torch.Tensor; got {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(
                f"{self.operator}: {name} must be {allowed}{why and f' ({why})'};"
                f" got {str(tensor.dtype).removeprefix('torch.')}"
            )
        if self.device is None:
            self.device = tensor.device
        elif tensor.device != self.device:
            raise ValueError(
                f"{self.operator}: {name} must be on {self.device} as the arguments before it; got {tensor.device}"
            )
        self._bind(name, tensor, letters.split())

    def _bind(self, name: str, tensor: Tensor, letters: list[str]) -> None:
        fits = tensor.dim() == len(letters)
        if fits:
            for letter, size in zip(letters, tensor.shape):
                if "*" not in letter and letter not in self.sizes:
                    self.sizes[letter] = size
                    self.origins[letter] = name
                elif self._size(letter) != size:
                    fits = False
        if not fits:
            raise ValueError(self._shape_error(name, tensor, letters))

    def _size(self, letter: str) -> int:
        size = 1
        for factor in letter.split("*"):
            size = size * self.sizes[factor]
        return size

    def _shape_error(self, name: str, tensor: Tensor, letters: list[str]) -> str:
        known = dict.fromkeys(factor for letter in letters for factor in letter.split("*"))
        sizes = ", ".join(
            f"{letter} = {self.sizes[letter]} (from {self.origins[letter]})"
            for letter in known
            if self.origins.get(letter, name) != name
        )
        return (
            f"{self.operator}: {name} must have shape [{', '.join(letters)}]{sizes and f' with {sizes}'};"
            f" got {list(tensor.shape)}"
        )
