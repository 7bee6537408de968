"""`concept_gates`: its refusals, and what it does when nobody checked."""

import re

import pytest
import torch

from perfusion_kernels import concept_gates, validate_concepts
from perfusion_kernels.concept_gates import OPERATOR

from . import cases, plain
from .tolerance import assert_close, assert_no_worse, exactly

RUNS = cases.runs("concept_gates")
pytestmark = pytest.mark.numeric
each_run = pytest.mark.parametrize("backend, device", RUNS)


@pytest.fixture
def arguments():
    return cases.make(B=4, J=2, S=5).arguments("concept_gates")


def refused(arguments, message, **changes):
    with pytest.raises(ValueError, match=re.escape(message)):
        concept_gates(**{**arguments, **changes})


def changed(tensor, where, value):
    tensor = tensor.clone()
    tensor[where] = value
    return tensor


def test_refusals_of_values(arguments):
    used = arguments["index"][1].tolist()
    refused(
        arguments,
        "concept_gates: temperature must be positive; got -0.1 at row 1, place 1",
        temperature=changed(arguments["temperature"], (1, 1), -0.1),
    )
    refused(arguments, "concept_gates: bias must be finite", bias=changed(arguments["bias"], (1, 1), torch.inf))
    refused(
        arguments, "concept_gates: encodings must be finite", encodings=changed(arguments["encodings"], 0, torch.nan)
    )
    for table in ("targets", "metric_targets"):
        refused(
            arguments,
            f"concept_gates: {table} must be finite; got another value in slot {used[0]}",
            **{table: changed(arguments[table], used[0], torch.nan)},
        )
    refused(
        arguments,
        f"concept_gates: the energy targets · metric_targets must be positive; got 0 in slot {used[0]}",
        metric_targets=changed(arguments["metric_targets"], used[0], 0.0),
    )


def test_dependent_concepts_are_named(arguments):
    message = "the concepts of one row must be independent; in row 1 slot 2, slot 2 are copies"
    refused(arguments, message, index=changed(arguments["index"], 1, 2))
    nearly = arguments["targets"].clone()
    nearly[3] = nearly[2] * 1.0001
    metric_targets = changed(arguments["metric_targets"], 3, arguments["metric_targets"][2])
    with pytest.raises(ValueError, match="here: .*; in row 1 'cat', 'dog' are copies of each other"):
        validate_concepts(
            nearly,
            metric_targets,
            torch.tensor([[-1, 1], [2, 3]]),
            names=["", "bird", "cat", "dog", ""],
            operator="here",
        )


def test_a_bystander_is_not_named():
    """Of three concepts two are nearly the same; the third is not their fault."""
    case = cases.make(J=3, dtype=torch.float64)
    targets, metric_targets = case.targets.clone(), case.metric_targets.clone()
    targets[3], metric_targets[3] = targets[1] + 1e-4 * targets[2], metric_targets[1] + 1e-4 * metric_targets[2]
    with pytest.raises(ValueError, match="slot 1, slot 3 are copies"):
        validate_concepts(targets, metric_targets, torch.tensor([[1, 4, 3]]))


@each_run
def test_close_but_distinct_concepts_are_accepted(backend, device):
    """Cosine 0.99 in the metric is legitimate, and float32 solves it as well as it is conditioned."""
    C = cases.covariance(48)
    L = torch.linalg.cholesky(C)
    x, y = torch.eye(48, dtype=torch.float64)[:2] @ L.T
    A = torch.stack([x, 0.99 * x + (1 - 0.99**2) ** 0.5 * y])
    M = torch.linalg.solve(C, A.T).T
    e = torch.randn(1, 77, 48, dtype=torch.float64) @ L.T
    rest = torch.tensor([[0, 1]], dtype=torch.int32), torch.full((1, 2), 0.6), torch.full((1, 2), 0.15)
    single = [x.float() for x in (e, A, M)]
    exact = exactly(plain.concept_gates, *(x.double() for x in single), *rest)
    for mine, truth in zip(concept_gates(*(x.to(device) for x in (*single, *rest)), backend=backend), exact, strict=True):
        assert_close(mine.cpu(), truth)


def test_unused_places_are_not_checked(arguments):
    """The case factory put NaN there: bias, temperature and slot 0."""
    assert all(torch.isfinite(result).all() for result in concept_gates(**arguments, validate=True))


@each_run
def test_unchecked_nonsense_stays_in_its_row(arguments, backend, device):
    """Dependent concepts give values that are not finite, in the row that has them and nowhere else."""
    arguments = {name: tensor.to(device) for name, tensor in arguments.items()}
    expected = concept_gates(**arguments, backend=backend)
    nonsense = {**arguments, "index": changed(arguments["index"], 1, 2)}
    gates, components = concept_gates(**nonsense, validate=False, backend=backend)
    assert not torch.isfinite(components[1]).all()
    for row in (0, 2, 3):
        assert torch.equal(gates[row], expected[0][row]) and torch.equal(components[row], expected[1][row])


@each_run
def test_result_dtype(backend, device):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        arguments = cases.make(dtype=dtype, device=device, backend=backend).arguments("concept_gates")
        assert {x.dtype for x in concept_gates(**arguments, backend=backend)} == {torch.float32}
    arguments = cases.make(dtype=torch.float16).arguments("concept_gates")
    wide = {name: arguments[name].double() for name in ("targets", "metric_targets")}
    assert {x.dtype for x in concept_gates(**{**arguments, **wide})} == {torch.float64}


# interpreted, Triton takes half a minute for 130 places, which to its kernel are as 17
@pytest.mark.parametrize("backend, device, J", [(*run, J) for run in RUNS for J in (9, 17, 130) if (*run, J) != ("triton", "cpu", 130)])
def test_more_concepts_than_registers_hold(backend, device, J):
    """Eight and more places are the same formula, in shared memory or beyond it: places that are not used change nothing."""
    case = cases.make(B=3, T=3, D=J + 20, J=J, device=device, backend=backend)
    arguments = case.arguments("concept_gates")
    arguments["index"] = arguments["index"].clone()
    arguments["index"][:, 3:] = -1
    few = {name: x[:, :3] if name in ("index", "bias", "temperature") else x for name, x in arguments.items()}
    results = concept_gates(**arguments, backend=backend)
    same = plain.concept_gates(*cases.positional("concept_gates", few))
    exact = {name: x.double() if x.is_floating_point() else x for name, x in few.items()}
    for many, naive, truth in zip(results, same, exactly(plain.concept_gates, *cases.positional("concept_gates", exact))):
        assert_no_worse(many[..., :3], naive, truth, few["index"])
        assert not many[..., 3:].any()


def test_derivatives_beyond_registers_are_plain_torch_s():
    """Triton's kernels hold eight places; with more, its gates have the reference's derivatives."""
    own = OPERATOR.backwards.get("triton")
    for J in (8, 9) if own else ():
        case = cases.make(B=2, T=3, J=J)
        arguments = cases.positional("concept_gates", case.arguments("concept_gates"))
        reason = own.unsupported(case.gates, case.components, *(x if x is None else x.to("meta") for x in arguments), [True] * 8)
        assert ("up to 8 concepts in registers; got J = 9" in reason) == (J == 9)
    for backend, device in cases.runs("concept_gates"):
        arguments = cases.make(B=2, T=3, J=9, device=device).arguments("concept_gates")
        leaf = arguments["encodings"] = arguments["encodings"].requires_grad_()
        sum(x.sum() for x in concept_gates(**arguments, backend=backend)).backward()
        assert leaf.grad.isfinite().all() and leaf.grad.any()
