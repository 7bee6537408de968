"""Faults put into the Triton kernels of gates and of the edit; each must be seen by the check that names its kind."""

import pytest
import torch

from perfusion_kernels.reference.concept_gates import concept_gates_backward as gates_reference
from perfusion_kernels.reference.fused_edited_projection import fused_edited_projection as fused_reference
from perfusion_kernels.reference.rank_one import rank_one_backward, rank_one_update
from perfusion_kernels.triton import concept_gates, concept_gates_backward, fused_edited_projection, rank_one

from . import cases, plain
from .mutants import assert_killed
from .tolerance import assert_close, assert_no_worse, assert_rounded_once, exactly

pytestmark = pytest.mark.proof

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WHOLE = (True, True, False, True, True)


def gates_are_right(module):
    """Overlapping concepts of unequal energy, D no multiple of a block, NaN around every tensor."""
    case = cases.make(T=5, D=7, J=3, views=True, device=DEVICE)
    arguments = cases.positional("concept_gates", case.arguments("concept_gates"))
    exact = cases.positional("concept_gates", case.double().arguments("concept_gates"))
    results = (function.concept_gates(*arguments) for function in (module, plain))
    for mine, naive, truth in zip(*results, exactly(plain.concept_gates, *exact)):
        assert_no_worse(mine, naive, truth, case.index)


def gates_derivatives_are_right(module):
    """Concepts that overlap, slots that rows share, tokens of more than one block, neither filling theirs nor the columns."""
    case = cases.make(T=11, D=7, J=3, S=4, views=True, device=DEVICE)
    arguments = cases.positional("concept_gates", case.arguments("concept_gates"))
    exact = cases.positional("concept_gates", case.double().arguments("concept_gates"))
    gradients = [torch.linspace(first, 1, case.gates.numel(), device=DEVICE).view(case.gates.shape) for first in (-1, -2)]
    needs = [x is not None and x.is_floating_point() for x in arguments]
    reference = exactly(gates_reference, *(x.double() for x in gradients), *exact, tuple(needs))
    for mine, truth in zip(module.concept_gates_backward(*gradients, *arguments, needs), filter(None, reference), strict=True):
        assert_close(mine, truth)


def edit_is_right(module):
    """Rounded once, as the reference rounds; rows without a concept keep their bits, signs of zeros included."""
    case = cases.make(T=5, D=7, J=3, dtype=torch.float16, views=True, device=DEVICE)
    edit = (case.gates, case.components, case.index, case.value_outputs, case.value_targets)
    base = case.value.flatten(2).contiguous()
    base[0] = -0.0
    unedited = base.clone()
    expected = rank_one_update(base, *edit).half()
    module.add_rank_one(base, *edit)
    assert torch.equal(base[0].view(torch.int16), expected[0].view(torch.int16))
    wide = (x.double() if x.is_floating_point() else x for x in (unedited, *edit))
    assert_rounded_once(base, *exactly(rank_one_update, *wide))


def fused_projection_is_right(module):
    """Tokens in two pieces and in two programs, rows with all, some and no concepts, D and O no multiples of a block."""
    for T in (40, 131):
        case = cases.make(B=4, T=T, D=35, J=3, H=1, d=37, views=True, device=DEVICE)
        arguments = cases.positional("fused_edited_projection", case.arguments("fused_edited_projection"))
        exact = exactly(fused_reference, *(x.double() if x.is_floating_point() else x for x in arguments))
        assert_close(module.fused_edited_projection(*arguments), *exact)


def derivatives_are_right(module):
    """Slots that rows share, tokens of more than one block, the last of them and the columns not filling theirs."""
    case = cases.make(B=4, T=19, D=7, J=2, S=3, views=True, device=DEVICE)
    edit = (case.gates, case.components, case.index, case.value_outputs, case.value_targets)
    gradient = cases.poisoned_view(torch.linspace(-1, 1, case.value.numel(), device=DEVICE).view(4, 19, -1))
    shared = case.index[case.index >= 0].bincount()
    assert shared.max() > 1
    wide = (x.double() if x.is_floating_point() else x for x in (gradient, *edit))
    for mine, truth in zip(module.rank_one_backward(gradient, *edit, WHOLE), exactly(rank_one_backward, *wide, WHOLE)):
        if truth is not None:
            assert_close(mine, truth)


GATES = {
    "the gate of the neighbour's concept": ("bias_b + j * bias_j, mask=present", "bias_b + (j + 1) % J * bias_j, mask=present"),
    "the mask over D off by one": (
        "inside = present[:, None] & (d < D)[None, :]\n        m", "inside = present[:, None] & (d <= D)[None, :]\n        m"
    ),
    "similarities for components": ("for pivot in tl.static_range(J):", "for pivot in tl.static_range(0):"),
    "the system transposed": ("left = tl.where(here, column - 1.0, column)", "left = tl.where(here, row - 1.0, row)"),
    "the pivot's row cleared": ("left = tl.where(here, column - 1.0, column)", "left = column"),
}  # fmt: skip
GATES_DERIVATIVES = {
    "the system not transposed": ("solved(tl.trans(system), da", "solved(system, da"),
    "energies without a derivative": ("tl.sum(ds * c, 0)[:, None], 0.0)", "0.0 * tl.sum(ds * c, 0)[:, None], 0.0)"),
    "gates alone": ("dc = divided(ds + y,", "dc = divided(ds,"),
    "components alone": ("dc = divided(ds + y,", "dc = divided(y,"),
    "the first block of tokens alone": ("for _ in range(blocks):", "for _ in range(1):"),
    "targets in place of metric targets": ("gram[:, :, None] * m[:, None, :], 0)", "gram[:, :, None] * i[:, None, :], 0)"),
    "the Gram matrix's part left out": ("gram = -tl.sum(y[:, :, None] * a[:, None, :], 0)", "gram = 0.0 * system"),
    "the temperature's derivative by c": ("by_temperature = -tl.sum(ds * logits, 0)", "by_temperature = -tl.sum(ds * c, 0)"),
    "the first row's gradient": ("gates_gradient + b * dg_b", "gates_gradient + 0 * dg_b"),
}  # fmt: skip
EDIT = {
    "targets added": ("- a[:, None] * target[None, :]", "+ a[:, None] * target[None, :]"),
    "rows without a concept rewritten": ("if concepts > 0:", "if concepts >= 0:"),
    "rounded twice": ("rounded(unedited + edit, result.dtype.element_ty)", "unedited.to(tl.float16) + edit.to(tl.float16)"),
    "the first concept for all": ("        slot = slots_at(index + b * index_b + j * index_j, True", "        slot = slots_at(index + b * index_b, True"),
}  # fmt: skip
FUSED = {
    "the gates of the first row": ("gates += b * gates_b", "gates += 0 * b"),
    "the second piece's tokens for the first's": ("targets, t1, o, end, O, J,", "targets, t1 - T0, o, end, O, J,"),
    "a rest of the encodings left out": ("range(0, D, BLOCK_K)", "range(0, D - BLOCK_K, BLOCK_K)"),
    "the second program's tokens left out": ("first = tl.program_id(1) * each", "first = 0 * each"),
    "encodings of the first row": ("encodings += b * encodings_b", "encodings += 0 * b"),
}  # fmt: skip
DERIVATIVES = {
    "sums by every line": ("(earlier == 0)", "(earlier >= 0)"),
    "the first line alone": ("for line in range(first, count):", "for line in range(first, first + 1):"),
    "the mask over O off by one": ("(o < O)[None, :]\n            places = t.to", "(o <= O)[None, :]\n            places = t.to"),
    "the last block of tokens alone": ("by_output += tl.sum(d * g[:, None], 0)", "by_output = tl.sum(d * g[:, None], 0)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", GATES)
def test_faults_in_gates_are_seen(fault, tmp_path):
    assert_killed(gates_are_right, concept_gates, *GATES[fault], tmp_path)


@pytest.mark.parametrize("fault", GATES_DERIVATIVES)
def test_faults_in_the_derivatives_of_gates_are_seen(fault, tmp_path):
    assert_killed(gates_derivatives_are_right, concept_gates_backward, *GATES_DERIVATIVES[fault], tmp_path)


@pytest.mark.parametrize("fault", EDIT)
def test_faults_in_the_edit_are_seen(fault, tmp_path):
    assert_killed(edit_is_right, rank_one, *EDIT[fault], tmp_path)


@pytest.mark.parametrize("fault", FUSED)
def test_faults_in_the_fused_projection_are_seen(fault, tmp_path):
    assert_killed(fused_projection_is_right, fused_edited_projection, *FUSED[fault], tmp_path)


@pytest.mark.parametrize("fault", DERIVATIVES)
def test_faults_in_the_derivatives_are_seen(fault, tmp_path):
    assert_killed(derivatives_are_right, rank_one, *DERIVATIVES[fault], tmp_path)


def test_a_mutant_needs_its_piece_of_source_once(tmp_path):
    with pytest.raises(AssertionError, match="must have 'no such text' once; it has it 0 times"):
        assert_killed(lambda module: None, rank_one, "no such text", "", tmp_path)


def test_a_check_that_sees_nothing_kills_nothing(tmp_path):
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        assert_killed(lambda module: None, rank_one, *EDIT["targets added"], tmp_path)
