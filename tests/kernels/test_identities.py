"""What follows from the paper's equations 3 and 4, checked in float64 on an ill-conditioned second moment."""

import os
from pathlib import Path

import pytest
import torch

from perfusion_kernels import concept_gates, edited_attention, edited_projection, fused_edited_attention, metric

from . import cases
from .tolerance import assert_agree

pytestmark = pytest.mark.numeric


def covariances():
    """A synthetic second moment; a real one too, if PERFUSION_COVARIANCE names a safetensors file with it."""
    yield pytest.param(cases.covariance(48), id="synthetic")
    if path := os.environ.get("PERFUSION_COVARIANCE"):
        from safetensors.torch import load_file

        yield pytest.param(load_file(Path(path))["covariance"].double(), id="real")


each_covariance = pytest.mark.parametrize("C", list(covariances()))


def double_case(C, **sizes):
    return cases.make(dtype=torch.float64, C=C, **sizes)


def one_row(case, slots, width=None):
    """The case's first row, using these slots."""
    width = len(slots) if width is None else width
    index = torch.tensor([slots + [-1] * (width - len(slots))], dtype=torch.int32)
    return case.encodings[:1], index


def uniform(index, bias=0.6, temperature=0.15):
    return tuple(torch.full(index.shape, value, dtype=torch.float64) for value in (bias, temperature))


@each_covariance
def test_one_concept_is_equation_3(C):
    case = double_case(C, J=1)
    e, index = one_row(case, [2])
    i, W, o = case.targets[2], case.value_weight, case.value_outputs[2]

    def by_the_equation():
        inverse = torch.linalg.inv(case.covariance)
        c = e[0] @ inverse @ i / (i @ inverse @ i)
        g = torch.sigmoid((c - 0.6) / 0.15)
        return g, c, (e[0] - c[:, None] * i) @ W.T + g[:, None] * o

    def by_the_operators():
        metric_targets = metric.metric_targets(case.targets.nan_to_num(), case.covariance)
        gates, components = concept_gates(e, case.targets, metric_targets, index, *uniform(index))
        result = edited_projection(e, W, gates, components, index, case.value_outputs, case.value_targets)
        return gates[0, :, 0], components[0, :, 0], result[0]

    assert_agree(by_the_operators, by_the_equation)


@each_covariance
@pytest.mark.parametrize("J", (1, 2, 3, 8))
def test_gram_solve_is_the_projection_by_qr(C, J):
    """Aᵀ a is the C⁻¹-orthogonal projection, here by QR of the whitened targets (the paper's appendix B)."""
    case = double_case(C, J=J)
    e, index = one_row(case, list(range(1, J + 1)))
    A = case.targets[1 : J + 1]

    def by_qr():
        L = torch.linalg.cholesky(case.covariance)
        Q = torch.linalg.qr(torch.linalg.solve_triangular(L, A.T, upper=False)).Q
        return (L @ Q @ Q.T @ torch.linalg.solve_triangular(L, e[0].T, upper=False)).T

    assert_agree(lambda: concept_gates(e, case.targets, case.metric_targets, index, *uniform(index))[1][0] @ A, by_qr)


@each_covariance
def test_the_target_itself_becomes_its_gated_output(C):
    """e = i* gives exactly g(1) o*, also beside a second concept."""
    case = double_case(C)
    for slots in ([1], [1, 2]):
        e, index = case.targets[None, 1:2], one_row(case, slots)[1]

        def by_the_operators():
            gates, a = concept_gates(e, case.targets, case.metric_targets, index, *uniform(index))
            result = edited_projection(e, case.value_weight, gates, a, index, case.value_outputs, case.value_targets)
            return gates[0, 0, 0], a[0, 0], result[0, 0]

        def expected():
            gates, _ = concept_gates(e, case.targets, case.metric_targets, index, *uniform(index))
            open_gate = torch.sigmoid(torch.tensor(0.4 / 0.15, dtype=torch.float64))
            return open_gate, torch.eye(len(slots)).double()[0], gates[0, 0] @ case.value_outputs[slots]

        assert_agree(by_the_operators, expected)


@each_covariance
def test_an_orthogonal_token_keeps_its_projection(C):
    """e with C⁻¹-inner product 0 to i* gives W e + g(0) o*."""
    case = double_case(C, J=1)
    e, index = one_row(case, [1])
    i, m = case.targets[1], case.metric_targets[1]

    def orthogonal():
        return e - (e @ m / (i @ m))[..., None] * i

    def by_the_operators():
        edit = concept_gates(orthogonal(), case.targets, case.metric_targets, index, *uniform(index))
        return edited_projection(orthogonal(), case.value_weight, *edit, index, case.value_outputs, case.value_targets)

    def expected():
        return orthogonal() @ case.value_weight.T + torch.sigmoid(torch.tensor(-0.6 / 0.15, dtype=torch.float64)) * case.value_outputs[1]

    assert_agree(by_the_operators, expected)


@each_covariance
def test_scales_cancel(C):
    """Neither the scale of C nor any positive scale of a row of metric_targets matters."""
    case = double_case(C, J=3)
    arguments = case.arguments("concept_gates")
    rows = torch.logspace(-6, 6, case.targets.shape[0]).double()[:, None]

    def solved(factor):
        metric_targets = metric.metric_targets(case.targets[1:], factor * case.covariance)
        return concept_gates(**{**arguments, "metric_targets": torch.cat([case.targets[:1], metric_targets])})

    assert_agree(lambda: solved(1e5), lambda: solved(1))
    assert_agree(
        lambda: concept_gates(**{**arguments, "metric_targets": rows * case.metric_targets}), lambda: concept_gates(**arguments)
    )


@each_covariance
def test_components_are_similarities_if_targets_are_orthogonal(C):
    case = double_case(C, J=2)
    e, index = one_row(case, [0, 1])
    L = torch.linalg.cholesky(case.covariance)
    A = torch.linalg.qr(torch.linalg.solve_triangular(L, case.targets[1:3].T, upper=False)).Q.T @ L.T
    M = metric.metric_targets(A, case.covariance)
    assert_agree(lambda: concept_gates(e, A, M, index, *uniform(index))[1][0], lambda: e[0] @ M.T / (A * M).sum(-1))


@pytest.mark.parametrize(
    "bias, temperature, expected",
    [(0.70, 0.15, (0.0093, 0.047, 0.209, 0.583, 0.881)), (0.75, 0.10, (0.0006, 0.0067, 0.076, 0.500, 0.924))],
)
def test_gate_values(bias, temperature, expected):
    similarities = torch.linspace(0, 1, 5)
    i = torch.tensor([[1.0, 0.0]])
    e = torch.stack([similarities, torch.ones(5)], -1)[None]
    index = torch.zeros(1, 1, dtype=torch.int32)
    gates, a = concept_gates(e, i, i, index, torch.tensor([[bias]]), torch.tensor([[temperature]]))
    assert torch.equal(a[0, :, 0], similarities)
    for gate, value in zip(gates[0, :, 0].tolist(), expected):
        assert round(gate, len(str(value)) - 2) == value  # as many digits as are given


def test_absent_places_change_nothing():
    """The same concepts in other places, beside absent ones, give the same result."""
    case = cases.make(dtype=torch.float64)
    e = case.encodings[:1]

    def placed(slots):
        index = torch.tensor([slots], dtype=torch.int32)
        results = concept_gates(e, case.targets, case.metric_targets, index, *uniform(index))
        assert not any(result[..., index[0] < 0].any() for result in results)
        return tuple(result[..., index[0] >= 0] for result in results)

    for slots in ([-1, 1, -1, 3], [1, -1, 3, -1]):
        assert_agree(lambda: placed(slots), lambda: placed([1, 3]))


def test_the_key_lock_is_an_edit_of_the_encodings():
    """With o*_K = W_K s, one edited encoding e - Aᵀ a + Σ g s serves every layer's untouched W_K."""
    case = cases.make(dtype=torch.float64)
    arguments = case.arguments("concept_gates")
    gates, a = concept_gates(**arguments)
    A, s = (table[case.index.clamp(min=1).long()] for table in (case.targets, case.superclasses))
    edit = (gates, a, case.index, case.key_outputs, case.key_targets)
    assert_agree(
        lambda: edited_projection(case.encodings, case.key_weight, *edit),
        lambda: (case.encodings - a @ A + gates @ s) @ case.key_weight.T,
    )


def test_three_ways_to_attend_agree():
    """Edit on the way, edit before, and everything in one call."""
    case = cases.make(dtype=torch.float64)
    H = case.query.shape[2:]
    edit = {name: case.arguments("edited_attention")[name] for name in ("gates", "components", "index")}

    def before():
        keys, values = (
            edited_projection(case.encodings, weight, **edit, outputs=outputs, projected_targets=targets).unflatten(-1, H)
            for weight, outputs, targets in (
                (case.key_weight, case.key_outputs, case.key_targets),
                (case.value_weight, case.value_outputs, case.value_targets),
            )
        )
        return edited_attention(case.query, keys, values)

    def on_the_way():
        projected = {"key": case.encodings @ case.key_weight.T, "value": case.encodings @ case.value_weight.T}
        projected = {name: table.unflatten(-1, H) for name, table in projected.items()}
        return edited_attention(**{**case.arguments("edited_attention"), **projected})

    assert_agree(on_the_way, before)
    assert_agree(lambda: fused_edited_attention(**case.arguments("fused_edited_attention")), before)


def test_layers_concatenate():
    """One projection of all layers' weights is the layers' projections side by side."""
    case = cases.make(dtype=torch.float64)
    arguments = case.arguments("edited_projection")
    for columns in (slice(0, 10), slice(10, 24)):
        part = {**arguments, "weight": case.value_weight[columns]}
        for name in ("outputs", "projected_targets"):
            part[name] = arguments[name][:, columns]
        assert_agree(lambda: edited_projection(**part), lambda: edited_projection(**arguments)[..., columns])
