"""What follows from the paper's equations 3 and 4, checked in float64 on an ill-conditioned second moment."""

import os
from pathlib import Path

import pytest
import torch

from perfusion_kernels import concept_gates, edited_attention, edited_projection, fused_edited_attention, metric

from . import cases
from .tolerance import TIGHT

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
    inverse = torch.linalg.inv(case.covariance)
    energy = i @ inverse @ i
    c = e[0] @ inverse @ i / energy
    g = torch.sigmoid((c - 0.6) / 0.15)
    h = (e[0] - c[:, None] * i) @ W.T + g[:, None] * o

    gates, components = concept_gates(e, case.targets, case.metric_targets, index, *uniform(index))
    torch.testing.assert_close(gates[0, :, 0], g, **TIGHT)
    torch.testing.assert_close(components[0, :, 0], c, **TIGHT)
    result = edited_projection(e, W, gates, components, index, case.value_outputs, case.value_targets)
    torch.testing.assert_close(result[0], h, **TIGHT)


@each_covariance
@pytest.mark.parametrize("J", (1, 2, 3, 8))
def test_gram_solve_is_the_projection_by_qr(C, J):
    """Aᵀ a is the C⁻¹-orthogonal projection, here by QR of the whitened targets (the paper's appendix B)."""
    case = double_case(C, J=J)
    e, index = one_row(case, list(range(1, J + 1)))
    A = case.targets[1 : J + 1]
    L = torch.linalg.cholesky(case.covariance)
    Q = torch.linalg.qr(torch.linalg.solve_triangular(L, A.T, upper=False)).Q
    projected = (L @ Q @ Q.T @ torch.linalg.solve_triangular(L, e[0].T, upper=False)).T

    _, a = concept_gates(e, case.targets, case.metric_targets, index, *uniform(index))
    assert ((a[0] @ A - projected).norm() / projected.norm()) < 1e-12


@each_covariance
def test_the_target_itself_becomes_its_gated_output(C):
    """e = i* gives exactly g(1) o*, also beside a second concept."""
    case = double_case(C)
    for slots in ([1], [1, 2]):
        e, index = case.targets[None, 1:2], one_row(case, slots)[1]
        gates, a = concept_gates(e, case.targets, case.metric_targets, index, *uniform(index))
        result = edited_projection(e, case.value_weight, gates, a, index, case.value_outputs, case.value_targets)
        assert gates[0, 0, 0].item() == pytest.approx(torch.sigmoid(torch.tensor(0.4 / 0.15)).item(), abs=1e-7)
        torch.testing.assert_close(a[0, 0], torch.eye(len(slots)).double()[0], **TIGHT)
        torch.testing.assert_close(result[0, 0], gates[0, 0] @ case.value_outputs[slots], rtol=0, atol=1e-11)


@each_covariance
def test_an_orthogonal_token_keeps_its_projection(C):
    """e with C⁻¹-inner product 0 to i* gives W e + g(0) o*."""
    case = double_case(C, J=1)
    e, index = one_row(case, [1])
    i, m = case.targets[1], case.metric_targets[1]
    e = e - (e @ m / (i @ m))[..., None] * i
    gates, a = concept_gates(e, case.targets, case.metric_targets, index, *uniform(index))
    result = edited_projection(e, case.value_weight, gates, a, index, case.value_outputs, case.value_targets)
    g0 = torch.sigmoid(torch.tensor(-0.6 / 0.15).double())
    torch.testing.assert_close(result, e @ case.value_weight.T + g0 * case.value_outputs[1], rtol=0, atol=1e-11)


@each_covariance
def test_scales_cancel(C):
    """Neither the scale of C nor any positive scale of a row of metric_targets matters."""
    case = double_case(C, J=3)
    arguments = case.arguments("concept_gates")
    expected = concept_gates(**arguments)
    scaled = metric.metric_targets(case.targets[1:], 1e5 * case.covariance)
    rows = torch.logspace(-6, 6, case.targets.shape[0]).double()[:, None]
    for metric_targets in (torch.cat([case.targets[:1], scaled]), rows * case.metric_targets):
        for mine, other in zip(concept_gates(**{**arguments, "metric_targets": metric_targets}), expected):
            torch.testing.assert_close(mine, other, **TIGHT)


@each_covariance
def test_components_are_similarities_if_targets_are_orthogonal(C):
    case = double_case(C, J=2)
    e, index = one_row(case, [0, 1])
    L = torch.linalg.cholesky(case.covariance)
    A = torch.linalg.qr(torch.linalg.solve_triangular(L, case.targets[1:3].T, upper=False)).Q.T @ L.T
    M = metric.metric_targets(A, case.covariance)
    _, a = concept_gates(e, A, M, index, *uniform(index))
    torch.testing.assert_close(a[0], e[0] @ M.T / (A * M).sum(-1), rtol=0, atol=1e-11)


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
    torch.testing.assert_close(a[0, :, 0], similarities)
    for gate, value in zip(gates[0, :, 0].tolist(), expected):
        assert gate == pytest.approx(value, abs=0.5 * 10.0 ** -(len(str(value)) - 2))


def test_absent_places_change_nothing():
    """The same concepts in other places, beside absent ones, give the same result."""
    case = cases.make(dtype=torch.float64)
    e = case.encodings[:1]
    results = []
    for slots in ([1, 3], [-1, 1, -1, 3], [1, -1, 3, -1]):
        index = torch.tensor([slots], dtype=torch.int32)
        gates, a = concept_gates(e, case.targets, case.metric_targets, index, *uniform(index))
        results.append((gates[..., index[0] >= 0], a[..., index[0] >= 0]))
        assert not gates[..., index[0] < 0].any() and not a[..., index[0] < 0].any()
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], **TIGHT)


def test_the_key_lock_is_an_edit_of_the_encodings():
    """With o*_K = W_K s, one edited encoding e - Aᵀ a + Σ g s serves every layer's untouched W_K."""
    case = cases.make(dtype=torch.float64)
    arguments = case.arguments("concept_gates")
    gates, a = concept_gates(**arguments)
    A, s = (table[case.index.clamp(min=1).long()] for table in (case.targets, case.superclasses))
    locked = case.encodings - a @ A + gates @ s
    keys = edited_projection(case.encodings, case.key_weight, gates, a, case.index, case.key_outputs, case.key_targets)
    torch.testing.assert_close(keys, locked @ case.key_weight.T, rtol=0, atol=1e-11)


def test_three_ways_to_attend_agree():
    """Edit on the way, edit before, and everything in one call."""
    case = cases.make(dtype=torch.float64)
    H = case.query.shape[2:]
    edit = {name: case.arguments("edited_attention")[name] for name in ("gates", "components", "index")}
    keys, values = (
        edited_projection(case.encodings, weight, **edit, outputs=outputs, projected_targets=targets).unflatten(-1, H)
        for weight, outputs, targets in (
            (case.key_weight, case.key_outputs, case.key_targets),
            (case.value_weight, case.value_outputs, case.value_targets),
        )
    )
    before = edited_attention(case.query, keys, values)
    torch.testing.assert_close(edited_attention(**case.arguments("edited_attention")), before, **TIGHT)
    torch.testing.assert_close(fused_edited_attention(**case.arguments("fused_edited_attention")), before, **TIGHT)


def test_layers_concatenate():
    """One projection of all layers' weights is the layers' projections side by side."""
    case = cases.make(dtype=torch.float64)
    arguments = case.arguments("edited_projection")
    whole = edited_projection(**arguments)
    for columns in (slice(0, 10), slice(10, 24)):
        part = {**arguments, "weight": case.value_weight[columns]}
        for name in ("outputs", "projected_targets"):
            part[name] = arguments[name][:, columns]
        torch.testing.assert_close(edited_projection(**part), whole[..., columns], **TIGHT)
