"""When two results agree: the one policy of every numeric test here.

A result may be wrong by a few roundings of what it was summed from. How much that is, `exactly` finds out: it computes the result
in float64, and again with every operand of every operation changed by a tiny random part of itself. What the result moves, over the
size of the change, is its `scale`. Unlike the result itself it does not vanish where terms cancel, and unlike an error that somebody
once saw it depends on no processor and on no library of matrix products.

    assert_close(actual, exact)               `ROUNDINGS` of the actual's dtype, of the scale
    assert_agree(one, other)                  two ways to compute one result in float64, given as functions: of both their scales
    assert_no_worse(actual, plain, exact, …)  one rounding, and four times the error that the plain formula makes in the same dtype
    assert_same_run(actual, as_run(run))      a whole model's result in its own dtype: two roundings of it, of the scale
    assert_rounded_once(actual, exact)        half a unit of each element's last place, and `ROUNDINGS` of the wider dtype, of the scale

The plain formula is the one a reader would write, in the tested precision throughout. The bounds hold for all elements and for each
concept's rows alone: one number for everything can hide one wrong concept beside others of larger size. The multiple is 4, because
the largest error of few elements is a matter of luck: over 200 cases the quotient had median 1 and maximum 4.5.

tests/test_tolerances.py refuses other tolerances in numeric tests.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDINGS = 16  # sums of a few hundred terms, each rounded on the way, in any order
CHANGE = 2.0**-30  # of an operand in float64: far above a rounding, far below what counts twice
RUNS = 4
ARITHMETIC = (
    "mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "linear", "mul", "add", "sub", "rsub", "div", "sum", "mean", "exp", "sigmoid",
    "_softmax", "softmax", "sigmoid_backward", "_softmax_backward_data", "linalg_solve_ex", "_linalg_solve_ex", "linalg_inv_ex", "linalg_qr",
    "linalg_cholesky_ex", "linalg_solve_triangular", "cholesky_solve", "_linalg_eigh", "linalg_vector_norm",
    "_scaled_dot_product_flash_attention_for_cpu", "convolution", "native_group_norm", "native_layer_norm", "silu", "gelu", "tanh", "pow",
    "_scaled_dot_product_flash_attention_for_cpu_backward", "convolution_backward", "native_group_norm_backward",
    "native_layer_norm_backward", "silu_backward", "gelu_backward", "sqrt", "sin", "cos", "lerp", "addcmul", "addcdiv",
    "linalg_lstsq",
)  # fmt: skip


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
        with _Changed(seed, torch.float64, CHANGE):
            changed = _results(function(*arguments))
        for i, value in enumerate(values):
            if value is not None:
                scales[i] = torch.maximum(scales[i], (changed[i] - value).abs() / CHANGE)
    return tuple(None if value is None else Exact(value, scale) for value, scale in zip(values, scales))


def _results(found) -> tuple[Tensor | None, ...]:
    return tuple(x if x is None else x.detach() for x in (found if isinstance(found, tuple) else (found,)))


def as_run(run: Callable[[], Tensor | tuple[Tensor, ...]]) -> Exact | tuple[Exact, ...]:
    """What `run()` returns, as it is, and its scale: of a whole model, which exists in its own dtype alone. Operands are changed far more than
    that dtype rounds, or as much where it is a short one."""
    found = run()
    values = [torch.as_tensor(x).detach() for x in (found if isinstance(found, tuple) else (found,))]
    change = max(2.0**-14, torch.finfo(values[0].dtype).eps)
    scales = [value.double().abs() for value in values]
    for seed in range(RUNS // 2):  # a model takes a while
        with _Changed(seed, values[0].dtype, change):
            changed = run()
        for i, x in enumerate(changed if isinstance(changed, tuple) else (changed,)):
            moved = torch.as_tensor(x).detach().double() - values[i].double()
            scales[i] = torch.maximum(scales[i], moved.abs() / change)
    runs = tuple(Exact(value.double(), scale) for value, scale in zip(values, scales))
    return runs if isinstance(found, tuple) else runs[0]


class _Changed(TorchDispatchMode):
    """Every operand of an arithmetic operation that is of `dtype`, times 1 plus or minus `change`."""

    def __init__(self, seed: int, dtype: torch.dtype, change: float):
        super().__init__()
        self.seed, self.dtype, self.change, self.generators = seed, dtype, change, {}  # by device

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if operation.namespace == "perfusion_kernels":  # the operations inside
            device = next(x.device.type for x in arguments if isinstance(x, Tensor))
            with self:
                return operation.redispatch(_KERNELS[device], *arguments, **(keywords or {}))
        name = operation.__name__.split(".")[0]
        if name in ARITHMETIC:
            arguments = [self._changed(x) for x in arguments]
        elif name.removesuffix("_") in ARITHMETIC:  # in place
            arguments = [arguments[0], *map(self._changed, arguments[1:])]
        return operation(*arguments, **(keywords or {}))

    def _changed(self, x):
        if not isinstance(x, Tensor) or x.dtype != self.dtype or x.dim() == 0:  # a number alone is a setting, or a share that stays below 1
            return x
        if x.device not in self.generators:
            self.generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
        signs = 2 * torch.randint(2, x.shape, generator=self.generators[x.device], device=x.device).to(x) - 1
        changed = x * (1 + self.change * signs)
        return torch.where(changed.isfinite(), changed, x)  # a mask's least number


_KERNELS = {key.lower(): torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in ("CPU", "CUDA")}


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


def assert_agree(one: Callable[[], Tensor | tuple[Tensor, ...]], other: Callable[[], Tensor | tuple[Tensor, ...]]) -> None:
    """Both compute the same in float64, each to `ROUNDINGS` of its own scale."""
    for i, (mine, theirs) in enumerate(zip(exactly(one), exactly(other), strict=True)):
        scale = torch.maximum(mine.scale.max(), theirs.scale.max()).expand_as(theirs.value)
        assert_close(mine.value, Exact(theirs.value, 2 * scale), f"result {i}")


def assert_same_run(actual: Tensor, expected: Exact) -> None:
    """actual: of the run that `expected` is `as_run` of, computed in another way. Either may be wrong by a rounding of every operand."""
    assert_close(torch.as_tensor(actual), expected, roundings=2)


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
