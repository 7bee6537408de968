"""What the suites of operators share: cases at the shapes of real UNets, every row with concepts of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from torch import Tensor

from bench import roofline
from bench.measure import Options, Problem
from bench.timing import Candidate
from tests.kernels import cases, plain

T = 77
SMALL = (roofline.Layer(48, 64, 2, 2),)  # a UNet for --quick


@dataclasses.dataclass(frozen=True)
class Planned:
    """A problem by its name, before anything of it is drawn: `make` does that."""

    case: str
    layer: roofline.Layer
    make: Callable[[], Problem]

    @property
    def elements(self) -> int:
        """Values that pass through the layers of this kind in a step, for each row: what the layer is worth."""
        return self.layer.count * self.layer.N * self.layer.C


def unets(options: Options) -> Iterator[tuple[str, tuple[roofline.Layer, ...], int, int]]:
    """(model, its layers, text width, rows)."""
    if options.quick:
        yield "small", SMALL, 24, 2
        return
    for model in filter(roofline.UNETS.get, options.models):
        layers = tuple(layer for layer in roofline.UNETS[model] if not options.tokens or layer.N in options.tokens)
        for rows in options.rows:
            yield model, layers, roofline.TEXT_WIDTHS[model], rows


def places(options: Options) -> tuple[int, ...]:
    """J: how many concepts a row has."""
    return (3,) if options.quick else options.places or (1, 3)


def case(options: Options, *, B: int, D: int, J: int, H: int, d: int, N: int, channels: int = 1) -> cases.Case:
    return cases.make(
        B, T, D, J, B * J + 1 if J else 3, H, d, N, channels=channels, dtype=options.dtype, device=str(options.device),
        full=True, drawn_on=str(options.device),
    )  # fmt: skip


def problem(
    name: str, operator: str, arguments: dict[str, Tensor | None], scale: float, index: Tensor, options: Options,
    candidates: Callable[[dict[str, Tensor | None]], list[Candidate]], **shapes: int,
) -> Problem:  # fmt: skip
    """The plain formula is that of the tests, row by row, and so is the truth, in float64. candidates: makes them for these arguments."""

    def copied() -> list[Candidate]:
        return candidates({key: tensor if tensor is None else tensor.clone() for key, tensor in arguments.items()})

    values = cases.positional(operator, arguments, scale)
    if operator == "edited_attention" and arguments["index"] is None:
        values = (*values[:5], index, *values[6:])  # of no places

    def double(value):
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    formula = getattr(plain, operator)
    return Problem(
        name, shapes, options.dtype, index,
        exact=lambda: formula(*map(double, values)), plain=lambda: formula(*values),
        candidates=candidates(arguments), work=roofline.of(operator, arguments), again=copied,
        copied=sum(tensor.nbytes for tensor in arguments.values() if tensor is not None),
    )  # fmt: skip

