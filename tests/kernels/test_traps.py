"""Known ways to get the method wrong. Each test holds for the operators and fails for the wrong version beside it."""

import pytest
import torch

from perfusion_kernels import concept_gates, edited_attention, edited_projection, metric

from . import cases, plain
from .tolerance import Exact, assert_agree, assert_close, assert_no_worse, exactly

pytestmark = pytest.mark.numeric


def check_and_refute(assertion, right, wrong):
    assertion(right)
    with pytest.raises(AssertionError):
        assertion(wrong)


def overlapping_pair(cosine=0.7, D=48):
    """Two targets of a given cosine in the metric, and what gates need beside them."""
    C = cases.covariance(D)
    L = torch.linalg.cholesky(C)
    x, y = torch.linalg.qr(torch.randn(D, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q.T
    A = torch.stack([x, cosine * x + (1 - cosine**2) ** 0.5 * y]) @ L.T
    index = torch.tensor([[0, 1]], dtype=torch.int32)
    return A, metric.metric_targets(A, C), index, torch.full((1, 2), 0.6).double(), torch.full((1, 2), 0.15).double()


def test_similarities_for_components():
    """a = c subtracts an overlap twice: at e = i*_1 with cosine 0.7 half of W i*_1 stays, where nothing must."""
    A, M, index, bias, temperature = overlapping_pair()
    weight = torch.randn(16, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    e = A[None, :1]

    def remainder(components):
        projected, edit = A @ weight.T, components()
        return edited_projection(e, weight, torch.zeros_like(edit), edit, index, torch.zeros_like(projected), projected)

    def nothing_remains(components):
        assert_agree(lambda: remainder(components), lambda: torch.zeros(1, 1, 16).double())

    def approximate():
        return (e @ M.T) / (A * M).sum(-1)

    check_and_refute(nothing_remains, lambda: concept_gates(e, A, M, index, bias, temperature)[1], approximate)
    assert remainder(approximate).norm() > 0.3 * (A[0] @ weight.T).norm()


def test_projection_without_the_metric():
    """With the identity for C⁻¹, a C⁻¹-orthogonal token is edited although it must not be, one concept or many."""
    case = cases.make(J=1, D=48, dtype=torch.float64)
    i, m = case.targets[1], case.metric_targets[1]
    index = torch.ones(1, 1, dtype=torch.int32)
    bias, temperature = torch.full((1, 1), 0.6).double(), torch.full((1, 1), 0.15).double()

    def components(metric_targets):
        e = case.encodings[:1]
        e = e - (e @ m / (i @ m))[..., None] * i
        return concept_gates(e, case.targets, metric_targets, index, bias, temperature)[1]

    def stays(metric_targets):
        assert_agree(lambda: components(metric_targets), lambda: torch.zeros(1, case.encodings.shape[1], 1).double())

    check_and_refute(stays, case.metric_targets, case.targets)


def test_an_output_per_token_position():
    """The edit belongs to a token, not to its position: tokens in another order give outputs in that order."""
    case = cases.make(dtype=torch.float64)
    order = torch.randperm(case.encodings.shape[1], generator=torch.Generator().manual_seed(0))
    gates, components = concept_gates(**case.arguments("concept_gates"))
    outputs_by_position = torch.randn(order.numel(), case.value_weight.shape[0], dtype=torch.float64)

    def right(e, g, a):
        return edited_projection(e, case.value_weight, g, a, case.index, case.value_outputs, case.value_targets)

    def wrong(e, g, a):
        return right(e, 0 * g, a) + g.sum(-1, keepdim=True) * outputs_by_position

    def follows_the_tokens(project):
        assert_agree(
            lambda: project(case.encodings[:, order], gates[:, order], components[:, order]),
            lambda: project(case.encodings, gates, components)[:, order],
        )

    check_and_refute(follows_the_tokens, right, wrong)


def test_a_padding_mask():
    """All T positions take part: the weights sum to 1 over them, and each value counts."""
    case = cases.make(T=77)
    real = 9

    def right(value):
        return edited_attention(case.query, case.key, value)

    def wrong(value):
        return edited_attention(case.query, case.key[:, :real], value[:, :real])

    def every_position_counts(attend):
        counted = sum(
            attend(torch.zeros_like(case.value).index_fill_(1, torch.tensor([t]), 1.0)).mean() > 0 for t in range(77)
        )
        assert counted == 77

    check_and_refute(every_position_counts, right, lambda value: wrong(value))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_metric_in_half_precision(dtype):
    """Under autocast gates keep float32's accuracy; the same products under autocast do not."""
    case = cases.make(D=96, J=1, T=77)
    arguments = case.arguments("concept_gates")
    exact = exactly(plain.concept_gates, *cases.positional("concept_gates", case.double().arguments("concept_gates")))[0]
    used = case.index[:, 0] >= 0

    def accurate(gates):
        assert gates.dtype == torch.float32
        assert_close(gates[used], exact[used])

    with torch.autocast("cpu", dtype):
        right = concept_gates(**arguments)[0]
        m = case.metric_targets[case.index[:, 0].clamp(min=1).long()]
        i = case.targets[case.index[:, 0].clamp(min=1).long()]
        c = torch.bmm(case.encodings, m[..., None]).float() / torch.bmm(i[:, None], m[..., None]).float()
        wrong = torch.sigmoid((c - case.bias[:, None]) / case.temperature[:, None])
    check_and_refute(accurate, right, wrong)


def test_half_precision_metric_targets_are_refused():
    arguments = cases.make().arguments("concept_gates")
    with pytest.raises(TypeError, match="metric_targets must be float32 .*half precision cannot hold C⁻¹"):
        concept_gates(**{**arguments, "metric_targets": arguments["metric_targets"].half()})


def test_gates_that_scale_the_removal():
    """g multiplies o* only: with gates closed the concept's own component is removed all the same."""
    case = cases.make(J=1, dtype=torch.float64)
    e, index = case.targets[None, 1:2], torch.ones(1, 1, dtype=torch.int32)
    closed, a = torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1).double()

    def project(gates, components):
        projected = case.targets @ case.value_weight.T
        return edited_projection(e, case.value_weight, gates, components, index, case.value_outputs, projected)

    def removed(components):
        assert_agree(lambda: project(closed, components), lambda: torch.zeros(1, 1, len(case.value_weight)).double())

    check_and_refute(removed, a, closed * a)


def test_a_softmax_in_half_precision():
    """float16 scores lose far more than rounding the result does; the reference keeps them in float32."""
    case = cases.make(T=77, d=40, dtype=torch.float16)
    query, key, value = 32 * case.query, case.key, case.value
    exact = edited_attention(query.double(), key.double(), value.double())

    def right_to_rounding(result):
        assert_close(result, Exact(exact, exact.abs()), roundings=1)

    scores = torch.einsum("bnhd,bthd->bhnt", query, key) * query.shape[-1] ** -0.5
    wrong = torch.einsum("bhnt,bthd->bnhd", torch.softmax(scores, -1), value)
    check_and_refute(right_to_rounding, edited_attention(query, key, value), wrong)


def test_one_tolerance_for_all_concepts():
    """A bound on all elements together does not see that the output of one small concept is missing."""
    case = cases.make(B=4, J=1, dtype=torch.bfloat16)
    index = torch.tensor([[-1], [1], [2], [3]], dtype=torch.int32)
    size = torch.tensor([1.0, 1.0, 1e3, 1e-1])[:, None]
    arguments = case.arguments("edited_projection")
    arguments |= {
        "encodings": (case.encodings * torch.tensor([1, 1, 1e3, 1e-1])[:, None, None]).bfloat16(),
        "gates": torch.full(case.gates.shape, 0.9),
        "components": torch.full(case.components.shape, 0.1),
        "index": index,
        "outputs": case.value_outputs[:4] * size.bfloat16(),
        "projected_targets": case.value_targets[:4] * size.bfloat16(),
    }
    double = {n: x.double() if x.is_floating_point() else x for n, x in arguments.items()}
    (exact,) = exactly(lambda: edited_projection(**double))
    right = edited_projection(**arguments)
    without = {**arguments, "outputs": arguments["outputs"].index_fill(0, torch.tensor([3]), 0.0)}
    wrong = edited_projection(**without)

    error = (wrong.double() - exact.value).abs().max()
    assert error <= 4 * (right.double() - exact.value).abs().max()  # one number for all: unseen
    check_and_refute(lambda result: assert_no_worse(result, right, exact, index), right, wrong)
