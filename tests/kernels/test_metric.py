"""`metric`: C⁻¹, what it refuses, and shrinkage."""

import pytest
import torch

from perfusion_kernels import metric

from . import cases
from .tolerance import assert_agree, assert_close, assert_rounded_once, exactly

pytestmark = pytest.mark.numeric


def test_metric_targets_solve_the_covariance():
    C = cases.covariance(32)
    targets = torch.randn(5, 32, dtype=torch.float64)
    assert_agree(lambda: metric.MetricSolver(C)(targets) @ C, lambda: targets)
    assert_agree(lambda: metric.metric_targets(targets[0], C), lambda: metric.MetricSolver(C)(targets)[0])
    assert metric.metric_targets(targets.float(), C.float()).dtype == torch.float32
    assert metric.metric_targets(targets.half(), C.float()).dtype == torch.float32


def test_float32_covariance_is_inverted_in_float64():
    """The error is that of rounding the result, not that of a float32 solve."""
    C = cases.covariance(64).float()
    target = torch.randn(64)
    assert_rounded_once(metric.metric_targets(target, C), *exactly(torch.linalg.solve, C.double(), target.double()))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda C: C[:, :-1], r"covariance must have shape \[D, D\]; got \[8, 7\]"),
        (lambda C: C[0], r"covariance must have shape \[D, D\]; got \[8\]"),
        (lambda C: C.half(), "half precision cannot hold C; got torch.float16"),
        (lambda C: C + torch.triu(C, 1), "covariance must be symmetric; its entries differ by"),
        (lambda C: C.index_fill(0, torch.tensor([1]), torch.nan), "covariance must be finite; got 8 other values"),
        (
            lambda C: C - 0.01 * torch.eye(8),
            r"must be positive definite.*shrink it: metric.shrink\(covariance, max_condition\)",
        ),
        (lambda C: torch.zeros(8, 8), "must be positive definite"),
        (lambda C: (C[:, :5] @ C[:5]).float(), "must be positive definite; this one is singular in torch.float32"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=f"MetricSolver: .*{message}"):
        metric.metric_targets(torch.ones(8), change(cases.covariance(8)))


def test_wrong_targets_are_refused():
    with pytest.raises(ValueError, match=r"targets must have shape .* with D = 8 \(from covariance\); got \[3, 7\]"):
        metric.metric_targets(torch.ones(3, 7), cases.covariance(8))


def test_condition_number():
    expected = torch.tensor(cases.CONDITION, dtype=torch.float64)
    assert_agree(lambda: torch.tensor(metric.condition_number(cases.covariance(24)), dtype=torch.float64), lambda: expected)
    assert metric.condition_number(torch.diag(torch.tensor([1.0, 0.0]))) == float("inf")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_shrinkage_reaches_the_limit_and_no_more(dtype):
    C = cases.covariance(24).to(dtype)
    shrunk, weight = metric.shrink(C, 100.0)
    assert 0 < weight < 1 and shrunk.dtype == dtype
    (condition,) = exactly(lambda: torch.tensor(metric.condition_number(shrunk), dtype=torch.float64))
    assert_close(torch.tensor(100, dtype=dtype), condition)
    wide = C.double()
    mixed, trace = exactly(lambda: ((1 - weight) * wide + weight * wide.diagonal().mean() * torch.eye(24).double(), wide.trace()))
    assert_close(shrunk, mixed)
    assert_close(shrunk.trace(), trace)


def test_shrinkage_only_when_needed():
    C = cases.covariance(24)
    same, weight = metric.shrink(C, 1e4)
    assert same is C and weight == 0.0


def test_shrinkage_makes_a_rank_deficient_covariance_usable():
    few = torch.randn(10, 24)
    C = few.T @ few / 10
    with pytest.raises(ValueError, match="too few captions"):
        metric.MetricSolver(C)
    shrunk, weight = metric.shrink(C, 1e4)
    assert 0 < weight < 0.01
    metric.MetricSolver(shrunk)


def test_shrinkage_refusals():
    C = cases.covariance(8)
    for limit in (1.0, float("nan"), 1e300):
        with pytest.raises(ValueError, match="shrink: max_condition must be above 1 and at most"):
            metric.shrink(C, limit)
    with pytest.raises(
        ValueError, match="shrink: covariance must be a second moment, with no negative eigenvalue; got -"
    ):
        metric.shrink(C - 0.5 * torch.eye(8), 100.0)
