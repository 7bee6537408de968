"""When two results agree: no worse than a small multiple of the plain formula's own error.

The plain formula is the one a reader would write, in the tested precision throughout; both are measured
against float64. The bound holds for all elements and for each concept's rows alone: one number for
everything can hide one wrong concept beside others of larger size. The multiple is 4, because the
largest error of few elements is a matter of luck: over 200 cases the quotient had median 1 and maximum
4.5. In float64, where nothing is more exact, the bound is 1e-12 of the largest value.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def assert_no_worse(
    actual: Tensor, plain: Tensor, exact: Tensor, index: Tensor, factor: float = 4.0, dtype: torch.dtype | None = None
) -> None:
    """actual, plain, exact [B, ...]; the error of `actual` against that of `plain`, over all and per concept."""
    assert actual.shape == exact.shape and actual.dtype == (dtype or plain.dtype)
    step = 1e-12 if actual.dtype == torch.float64 else torch.finfo(actual.dtype).eps
    for who, rows in groups(index):
        error = (actual[rows].double() - exact[rows]).abs()
        own = (plain[rows].double() - exact[rows]).abs().max().item()
        bound = factor * own + step * exact[rows].abs().max().item()
        worst = error.max().item()
        assert worst <= bound, f"{who}: error {worst:.3g}, plain formula's {own:.3g}, bound {bound:.3g}"


def groups(index: Tensor) -> Iterator[tuple[str, Tensor]]:
    """All rows, then the rows that use each slot."""
    yield "all rows", torch.ones(index.shape[0], dtype=torch.bool, device=index.device)
    for slot in index[index >= 0].unique().tolist():
        yield f"slot {slot}", (index == slot).any(-1)


def twice_rounded(dtype: torch.dtype) -> dict[str, float]:
    """For assert_close: numbers of about 1 that differ by where 16 bits were rounded; its own tolerance for more bits."""
    step = torch.finfo(dtype).eps
    return dict(rtol=4 * step, atol=4 * step) if torch.finfo(dtype).bits == 16 else {}
