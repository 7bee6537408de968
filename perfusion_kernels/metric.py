"""The metric C⁻¹ in which concepts are compared: C is the uncentred second moment E[e eᵀ] of encodings.

Everything here computes in float64, once per text encoder and concept. The scale of C cancels in the method.
"""

import torch
from torch import Tensor

__all__ = ["MetricSolver", "condition_number", "metric_targets", "shrink"]


def metric_targets(targets: Tensor, covariance: Tensor) -> Tensor:
    """targets C⁻¹, for targets [S, D] or [D] and covariance [D, D]; in the dtype of targets, at least float32.

    Raises ValueError when the covariance is not finite, symmetric and positive definite.
    """
    return MetricSolver(covariance)(targets)


class MetricSolver:
    """C⁻¹ as a function, for one covariance [D, D] and many targets: factors once.

    Raises ValueError when the covariance is not finite, symmetric and, to its dtype's precision, positive definite.
    """

    def __init__(self, covariance: Tensor):
        _require_symmetric("MetricSolver", covariance)
        self._factor, failed = torch.linalg.cholesky_ex(_symmetric(covariance))
        pivots = self._factor.diagonal() ** 2
        floor = 10 * torch.finfo(covariance.dtype).eps * pivots.max()
        if failed or not pivots.min() > floor:
            raise ValueError(
                f"MetricSolver: covariance must be positive definite; this one is singular in {covariance.dtype}"
                f" (at dimension {int(failed) or int(pivots.argmin()) + 1} of {covariance.shape[0]}): too few"
                " captions for its width. Count more, or shrink it: metric.shrink(covariance, max_condition)"
            )

    def __call__(self, targets: Tensor) -> Tensor:
        """targets [S, D] or [D] -> targets C⁻¹, in the dtype of targets, at least float32."""
        width = self._factor.shape[0]
        if targets.dim() not in (1, 2) or targets.shape[-1] != width:
            raise ValueError(
                f"MetricSolver: targets must have shape [S, D] or [D] with D = {width} (from covariance);"
                f" got {list(targets.shape)}"
            )
        rows = targets.to(self._factor).reshape(-1, width)
        solution = torch.cholesky_solve(rows.T, self._factor).T.reshape(targets.shape)
        return solution.to(torch.promote_types(targets.dtype, torch.float32))


def shrink(covariance: Tensor, max_condition: float) -> tuple[Tensor, float]:
    """(1 - w) C + w μ I with the least w that brings the condition number to max_condition; μ is C's mean diagonal.

    Returns the covariance, in its dtype, and w. If the condition number is within the limit already, w is
    0.0 and the covariance is returned as it came. Report w > 0: the metric is then partly μ I instead of data.

    Raises ValueError when the covariance is not finite, not symmetric or clearly indefinite, and when
    max_condition is not above 1 or beyond what the covariance's dtype can hold.
    """
    _require_symmetric("shrink", covariance)
    limit = 0.1 / torch.finfo(covariance.dtype).eps
    if not 1 < max_condition <= limit:
        raise ValueError(
            f"shrink: max_condition must be above 1 and at most {limit:.3g}, what {covariance.dtype} can hold;"
            f" got {max_condition}"
        )
    wide = _symmetric(covariance)
    values = torch.linalg.eigvalsh(wide)
    low, high, mean = values[0].item(), values[-1].item(), values.mean().item()
    if not high > 0 or low < -1e-3 * high:
        raise ValueError(
            f"shrink: covariance must be a second moment, with no negative eigenvalue; got {low:.3g} beside {high:.3g}"
        )
    if low > 0 and high <= max_condition * low:
        return covariance, 0.0
    ratio = (high - max_condition * low) / (mean * (max_condition - 1))  # w / (1 - w)
    weight = ratio / (1 + ratio)
    shrunk = (1 - weight) * wide
    shrunk.diagonal().add_(weight * mean)
    return shrunk.to(covariance.dtype), weight


def condition_number(covariance: Tensor) -> float:
    """Largest over smallest eigenvalue of a covariance [D, D]; inf if the smallest is not positive."""
    _require_symmetric("condition_number", covariance)
    values = torch.linalg.eigvalsh(_symmetric(covariance))
    return (values[-1] / values[0]).item() if values[0] > 0 else float("inf")


def _symmetric(covariance: Tensor) -> Tensor:
    covariance = covariance.double()
    return (covariance + covariance.T) / 2


def _require_symmetric(caller: str, covariance: Tensor) -> None:
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1] or covariance.shape[0] == 0:
        raise ValueError(f"{caller}: covariance must have shape [D, D]; got {list(covariance.shape)}")
    if covariance.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{caller}: covariance must be float32 or float64, half precision cannot hold C; got {covariance.dtype}"
        )
    if not covariance.isfinite().all():
        raise ValueError(f"{caller}: covariance must be finite; got {int((~covariance.isfinite()).sum())} other values")
    asymmetry = (covariance - covariance.T).abs().max() / covariance.abs().max()
    if asymmetry > 1e-4:
        raise ValueError(
            f"{caller}: covariance must be symmetric; its entries differ by {asymmetry.item():.3g} of the largest"
        )
