"""When two results agree: the one policy of every numeric test here.

A result may be wrong by a few roundings of what it was summed from. How much that is, `exactly` finds out: it computes the result
in float64, and again with every operand of every operation changed by a tiny random part of itself. What the result moves, over the
size of the change, is its `scale`. Unlike the result itself it does not vanish where terms cancel, and unlike an error that somebody
once saw it depends on no processor and on no library of matrix products.

    assert_close(actual, exact)               `ROUNDINGS` of the actual's dtype, of the scale
    assert_no_worse(actual, plain, exact, …)  one rounding, and four times the error that the plain formula makes in the same dtype
    assert_rounded_once(actual, exact)        half a unit of each element's last place, and `ROUNDINGS` of the wider dtype, of the scale

The plain formula is the one a reader would write, in the tested precision throughout. The bounds hold for all elements and for each
concept's rows alone: one number for everything can hide one wrong concept beside others of larger size. The multiple is 4, because
the largest error of few elements is a matter of luck: over 200 cases the quotient had median 1 and maximum 4.5.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDINGS = 16  # sums of a few hundred terms, each rounded on the way, in any order
CHANGE = 2.0**-30  # of an operand: far above a rounding of float64, far below what counts twice
RUNS = 4
ARITHMETIC = (
    "mm", "bmm", "addmm", "baddbmm", "mv", "dot", "mul", "add", "sub", "rsub", "div", "sum", "_softmax", "softmax", "exp", "sigmoid",
    "linalg_solve_ex", "_linalg_solve_ex", "sigmoid_backward", "_softmax_backward_data",
)  # fmt: skip

TIGHT = dict(rtol=0, atol=1e-12)  # for assert_close of torch.testing: float64, numbers of about 1


@dataclass(frozen=True)
class Exact:
    """value, scale: float64, of one shape."""

    value: Tensor
    scale: Tensor

    def __getitem__(self, rows) -> "Exact":
        return Exact(self.value[rows], self.scale[rows])


def exactly(function: Callable[..., Tensor | None | tuple[Tensor | None, ...]], *arguments) -> tuple[Exact | None, ...]:
    """The results of `function(*arguments)`, which computes in float64, and their scales. Computed once for equal arguments, which the tests
    of one case on several backends have."""
    key = (function, _digest(arguments)) if arguments else None  # without any, they are in the function
    if key not in _known:
        found = _exactly(function, *arguments)
        if key is None:
            return found
        _known[key] = found
    return _known[key]


_known: dict[tuple[Callable, str], tuple[Exact | None, ...]] = {}


def _digest(arguments: tuple) -> str:
    """Of tensors by their content, of all else by its text."""
    state = hashlib.sha256()
    for x in arguments:
        if is_dataclass(x):
            state.update(_digest(tuple(vars(x).values())).encode())
        elif isinstance(x, Tensor):
            state.update(f"{x.dtype} {tuple(x.shape)} {x.device}".encode() + x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            state.update(repr(x).encode())
        state.update(b"\0")
    return state.hexdigest()


def _exactly(function: Callable, *arguments) -> tuple[Exact | None, ...]:
    values = _results(function(*arguments))
    scales = [None if value is None else value.abs() for value in values]
    for seed in range(RUNS):
        with _Changed(seed):
            changed = _results(function(*arguments))
        for i, value in enumerate(values):
            if value is not None:
                scales[i] = torch.maximum(scales[i], (changed[i] - value).abs() / CHANGE)
    return tuple(None if value is None else Exact(value, scale) for value, scale in zip(values, scales))


def _results(found) -> tuple[Tensor | None, ...]:
    return tuple(x if x is None else x.detach() for x in (found if isinstance(found, tuple) else (found,)))


class _Changed(TorchDispatchMode):
    """Every floating operand of an arithmetic operation, times 1 plus or minus CHANGE."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed, self.generators = seed, {}  # by device

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if operation.__name__.split(".")[0] in ARITHMETIC:
            arguments = [self._changed(x) for x in arguments]
        return operation(*arguments, **(keywords or {}))

    def _changed(self, x):
        if not isinstance(x, Tensor) or x.dtype != torch.float64:
            return x
        if x.device not in self.generators:
            self.generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
        signs = 2 * torch.randint(2, x.shape, generator=self.generators[x.device], device=x.device).to(x) - 1
        return x * (1 + CHANGE * signs)


def step(dtype: torch.dtype) -> float:
    """One rounding; of float64 as much as is left of it after ill-conditioned sums."""
    return 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps


def assert_close(actual: Tensor, exact: Exact, name: str = "", roundings: float = ROUNDINGS) -> None:
    """actual: the float64 result within `roundings` of the actual's dtype, of the scale."""
    assert actual.shape == exact.value.shape
    if actual.numel():
        error = (actual.double() - exact.value).abs().max().item()
        bound = roundings * step(actual.dtype) * exact.scale.max().item()
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"


def assert_rounded_once(actual: Tensor, exact: Exact) -> None:
    """actual: summed in the next wider dtype, float32 or float64, and then rounded. Each element for itself: large terms may cancel."""
    assert actual.shape == exact.value.shape
    wider = torch.float64 if actual.dtype == torch.float32 else torch.float32
    bound = torch.finfo(actual.dtype).eps / 2 * exact.value.abs() + ROUNDINGS * step(wider) * exact.scale
    bound = bound.clamp(min=torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps / 2)
    excess = (actual.double() - exact.value).abs() / bound
    assert excess.max() <= 1.001, f"error {excess.max():.3g} times its bound"


def assert_no_worse(actual: Tensor, plain: Tensor, exact: Exact, index: Tensor, factor: float = 4.0, dtype: torch.dtype | None = None) -> None:
    """actual, plain, exact [B, ...]; the error of `actual` against that of `plain`, over all and per concept."""
    assert actual.shape == exact.value.shape and actual.dtype == (dtype or plain.dtype)
    for who, rows in groups(index):
        error = (actual[rows].double() - exact.value[rows]).abs()
        own = (plain[rows].double() - exact.value[rows]).abs().max().item()
        bound = factor * own + step(actual.dtype) * exact.scale[rows].max().item()
        worst = error.max().item()
        assert worst <= bound, f"{who}: error {worst:.3g}, plain formula's {own:.3g}, bound {bound:.3g}"


def groups(index: Tensor) -> Iterator[tuple[str, Tensor]]:
    """All rows, then the rows that use each slot."""
    yield "all rows", torch.ones(index.shape[0], dtype=torch.bool, device=index.device)
    for slot in index[index >= 0].unique().tolist():
        yield f"slot {slot}", (index == slot).any(-1)


def twice_rounded(dtype: torch.dtype) -> dict[str, float]:
    """For torch.testing.assert_close: numbers of about 1 that differ by where 16 bits were rounded; its own tolerance for more bits."""
    step = torch.finfo(dtype).eps
    return dict(rtol=4 * step, atol=4 * step) if torch.finfo(dtype).bits == 16 else {}
