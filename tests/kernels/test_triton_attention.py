"""Triton's attention kernels: what the tests of every operator leave out.

Those run forward, gradients, views, dtypes and sizes on each backend; here are head widths, tilings, divisions of
the work, and what is promised bit for bit.
"""

from dataclasses import replace

import pytest
import torch

import perfusion_kernels
from perfusion_kernels import BackendUnavailable, edited_attention, fused_edited_attention

from . import cases, plain
from .tolerance import assert_close, assert_no_worse, exactly, step

pytest.importorskip("triton")

from perfusion_kernels.triton import attention_tiles, waves  # noqa: E402
from perfusion_kernels.triton import edited_attention as forward  # noqa: E402
from perfusion_kernels.triton import edited_attention_backward as backward  # noqa: E402
from perfusion_kernels.triton import fused_edited_attention as fused  # noqa: E402

DEVICE = cases.runs("edited_attention")[-1][1]
EDIT = ("gates", "components", "key_outputs", "key_targets", "value_outputs", "value_targets")
WIDTHS = (32, 40, 64, 72, 80, 96, 128, 160, 1, 7, 33, 256)


def attend(case, operator="edited_attention", **options):
    return cases.PUBLIC[operator](**case.arguments(operator), scale=0.3, backend="triton", **options)


def compare(operator, case):
    formula = getattr(plain, operator)
    same = formula(*cases.positional(operator, case.arguments(operator)))
    (exact,) = exactly(formula, *cases.positional(operator, case.double().arguments(operator)))
    assert_no_worse(attend(case, operator), same, exact, case.index)


def gradients(case, backend, operator="edited_attention", without=(), scale=0.3):
    """By name; `without` names tables that are not given."""
    arguments = {n: x for n, x in case.arguments(operator).items() if n not in without}
    leaves = {n: x.detach().clone().requires_grad_() for n, x in arguments.items() if n != "index"}
    result = cases.PUBLIC[operator](**{**arguments, **leaves}, scale=scale, backend=backend, validate=False)
    weights = torch.linspace(0.5, 1.5, result.numel(), dtype=torch.float64).to(result).view_as(result)
    (result * weights).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def exact_gradients(case, operator="edited_attention", without=(), scale=0.3):
    return exactly(lambda: tuple(gradients(case.double(), "reference", operator, without, scale).values()))


def assert_gradients(case, operator="edited_attention", without=(), scale=0.3):
    mine = gradients(case, "triton", operator, without, scale)
    for (name, gradient), exact in zip(mine.items(), exact_gradients(case, operator, without, scale), strict=True):
        assert_close(gradient, exact, name)


def test_the_backend_runs_here():
    assert ("triton", DEVICE) in cases.runs("edited_attention") and ("triton", DEVICE) in cases.runs("fused_edited_attention")


def test_pieces_cover_with_little_waste():
    """Two powers of two from 16 up, of which no others cover a size with less."""
    powers = (16, 32, 64, 128, 256)
    for size in range(1, 257):
        first, second = attention_tiles.pieces(size)
        assert first in powers and second in (0, *powers) and first > second
        assert size <= first + second == min(p + q for p in powers for q in (0, *powers) if p + q >= size)


@pytest.mark.parametrize("load", (1, 12))
@pytest.mark.parametrize("N, pairs", [(1, 1), (4096, 16), (4097, 16), (64, 16), (1024, 640), (9216, 3), (100, 4000), (70000, 5)])
def test_programs_share_the_tiles_out_and_end_as_early_as_any(N, pairs, load, monkeypatch):
    """Each tile has one program. On 132 multiprocessors, of which each holds three by registers, no other number of them ends earlier."""
    monkeypatch.setattr(waves, "_of_cuda", lambda device: (132, 65536, 228 * 1024))
    configuration = {"BLOCK_N": 64, "num_warps": 4}
    programs, each = waves.share(N, pairs, configuration, lambda tiles: 40000, torch.device("cuda"), load)
    tiles = -(-N // 64)
    assert (programs - 1) * each < tiles <= programs * each

    def time(programs):
        return -(-programs * pairs // (3 * 132)) * (-(-tiles // programs) + load)

    assert time(programs) == min(map(time, range(1, tiles + 1)))


def test_shared_memory_bounds_what_a_multiprocessor_holds(monkeypatch):
    monkeypatch.setattr(waves, "_of_cuda", lambda device: (10, 65536, 100 * 1024))
    for bytes_of_program, held in ((90000, 10), (49000, 20), (1000, 30)):
        assert waves._at_once({"num_warps": 4}, lambda tiles: bytes_of_program, torch.device("cuda")) == held


@pytest.mark.numeric
@pytest.mark.parametrize("d", WIDTHS)
def test_head_widths(d):
    compare("edited_attention", cases.make(B=2, T=77, H=1, d=d, N=19, device=DEVICE, seed=d))


@pytest.mark.numeric
@pytest.mark.parametrize("d", WIDTHS)
def test_gradients_of_head_widths(d):
    assert_gradients(cases.make(B=2, T=35, H=1, d=d, N=19, device=DEVICE, seed=d))


@pytest.mark.numeric
@pytest.mark.parametrize("d", (7, 40, 160))
@pytest.mark.parametrize("D", (1, 40))
def test_widths_in_the_fused_kernel(d, D):
    case = cases.make(B=2, T=35, D=D, J=1, H=2, d=d, N=19, device=DEVICE)
    compare("fused_edited_attention", case)


@pytest.mark.numeric
@pytest.mark.parametrize("T", (1, 16, 77, 80, 154, 231, 256))
def test_gradients_of_context_lengths(T):
    assert_gradients(cases.make(B=2, T=T, H=1, d=8, N=19, device=DEVICE, seed=T))


@pytest.mark.proof
@pytest.mark.parametrize("J", (1, 8, 9, 13))
@pytest.mark.parametrize("operator", ("edited_attention", "fused_edited_attention"))
def test_numbers_of_concepts_up_to_and_beyond_the_unrolled(operator, J):
    case = cases.make(B=4, T=17, J=J, H=1, d=8, N=3, device=DEVICE, views=True)
    compare(operator, case)
    assert_gradients(case, operator)


@pytest.mark.parametrize("J, dtype", ((1, torch.float32), (3, torch.bfloat16), (9, torch.float16)))
def test_rows_without_a_concept_have_the_bits_of_plain_attention(J, dtype):
    case = cases.make(B=5, T=35, J=J, H=1, d=40, N=19, dtype=dtype, device=DEVICE)
    none = (case.index < 0).all(-1)
    edited = attend(case)
    unedited = edited_attention(case.query, case.key, case.value, scale=0.3, backend="triton")
    assert none.any() and torch.equal(edited[none], unedited[none]) and not torch.equal(edited[~none], unedited[~none])
    fused_edited = attend(case, "fused_edited_attention")
    arguments = {**case.arguments("fused_edited_attention"), "index": torch.full_like(case.index, -1)}
    fused_unedited = fused_edited_attention(**arguments, scale=0.3, backend="triton")
    assert torch.equal(fused_edited[none], fused_unedited[none])


@pytest.mark.numeric
@pytest.mark.parametrize("scale", (0.0, -0.3))
def test_a_scale_that_is_not_positive(scale):
    """It is multiplied before the largest score is looked for."""
    case = cases.make(B=2, T=17, H=1, d=8, N=5, device=DEVICE)
    arguments = case.double().arguments("edited_attention")
    (exact,) = exactly(plain.edited_attention, *cases.positional("edited_attention", arguments, scale))
    assert_close(edited_attention(**case.arguments("edited_attention"), scale=scale, backend="triton"), exact)
    assert_gradients(case, scale=scale)


@pytest.mark.numeric
@pytest.mark.parametrize("side", ("key", "value"))
def test_gradients_of_one_side_alone(side):
    other = "value" if side == "key" else "key"
    case = cases.make(B=4, T=17, H=2, d=8, N=5, device=DEVICE)
    assert_gradients(case, without=(f"{other}_outputs", f"{other}_targets"))


@pytest.mark.numeric
def test_gradients_of_plain_attention():
    edit = ("gates", "components", "index", "key_outputs", "key_targets", "value_outputs", "value_targets")
    assert_gradients(cases.make(B=2, T=17, H=2, d=8, N=5, device=DEVICE), without=edit)


@pytest.mark.numeric
@pytest.mark.parametrize("programs", (1, 4, 512))
def test_the_division_of_the_work_does_not_matter(programs, monkeypatch):
    """One program for all queries of a head, several with several tiles, and one for each tile."""
    monkeypatch.setattr(waves, "PROGRAMS", programs)
    case = cases.make(B=2, T=17, J=1, H=1, d=8, N=67, device=DEVICE)
    compare("edited_attention", case)
    assert_gradients(case)


@pytest.mark.proof
@pytest.mark.parametrize(
    "module, name", [(forward, "tiles"), (backward, "tiles_by_query"), (backward, "tiles_by_key"), (fused, "tiles")]
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_every_configuration_that_may_be_chosen_is_right(module, name, dtype, monkeypatch):
    listed = getattr(module, name)
    case = cases.make(B=2, T=35, J=1, H=1, d=40, N=67, dtype=dtype, device=DEVICE)
    operator = "fused_edited_attention" if module is fused else "edited_attention"
    run = (lambda: {"": attend(case, operator)}) if name == "tiles" else (lambda: gradients(case, "triton"))
    if name == "tiles":
        exact = exactly(getattr(plain, operator), *cases.positional(operator, case.double().arguments(operator)))
    else:
        exact = exact_gradients(case)
    expected = run()
    for configuration in listed(35, 40, dtype)[1:] + listed(200, 160, dtype):
        monkeypatch.setattr(module, name, lambda *shape: (configuration,))
        for (argument, result), truth in zip(run().items(), exact, strict=True):
            if dtype == torch.float32:
                assert_close(result, truth, f"{configuration} {argument}")
            else:  # another order of sums may round a factor of the next product otherwise
                apart = (result.double() - expected[argument].double()).abs().max()
                assert apart <= step(dtype) * truth.scale.max(), f"{configuration} {argument}"


def test_equal_calls_give_equal_bits():
    case = cases.make(B=4, T=17, H=2, d=8, N=35, device=DEVICE)
    first, second = (gradients(case, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_layout_of_heads_is_taken_as_it_is():
    """Heads before positions, columns before everything, one row for all: no stride is assumed."""
    case = cases.make(B=3, T=17, H=2, d=8, N=5, device=DEVICE)
    expected = attend(case)
    for layout in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    ):
        moved = {name: layout(getattr(case, name)) for name in ("query", "key", "value")}
        assert torch.equal(attend(replace(case, **moved)), expected)
    alike = replace(case, query=case.query[:1].expand(3, -1, -1, -1))
    dense = replace(case, query=alike.query.contiguous())
    assert torch.equal(attend(alike), attend(dense))


def test_a_gradient_may_have_any_strides():
    case = cases.make(B=2, T=17, H=2, d=8, N=5, device=DEVICE)
    query, twin = (case.query.clone().requires_grad_() for _ in range(2))
    edited_attention(query, case.key, case.value, backend="triton").sum().backward()  # strides of 0
    (edited_attention(twin, case.key, case.value, backend="triton") * 1.0).sum().backward()
    assert torch.equal(query.grad, twin.grad)


@pytest.mark.parametrize("sizes", (dict(T=257), dict(d=257)))
def test_what_one_program_cannot_hold_is_refused(sizes):
    case = cases.make(B=1, J=1, H=1, N=1, device=DEVICE, **sizes)
    for operator in ("edited_attention", "fused_edited_attention"):
        with pytest.raises(BackendUnavailable, match="up to 256 of up to 256 columns; got T = .*257.*Can run it: .*reference"):
            attend(case, operator)
        assert cases.PUBLIC[operator](**case.arguments(operator), validate=False).isfinite().all()


@pytest.mark.numeric
def test_second_derivatives_are_the_reference_s():
    case = cases.make(B=2, T=5, H=1, d=4, N=3, device=DEVICE)

    def second(case, backend):
        query = case.query.clone().requires_grad_()
        result = edited_attention(query, case.key, case.value, backend=backend)
        (first,) = torch.autograd.grad(result.square().sum(), query, create_graph=True)
        return torch.autograd.grad(first.square().sum(), query)[0]

    assert_close(second(case, "triton"), *exactly(second, case.double(), "reference"))


def test_the_choice_says_which_operators_triton_has():
    status = {status.name: status for status in perfusion_kernels.available_backends()}["triton"]
    assert {"edited_attention", "fused_edited_attention"} <= set(status.operators)


def test_large_scores_do_not_overflow():
    case = cases.make(B=1, J=1, H=1, dtype=torch.float16, device=DEVICE)
    result = edited_attention(100 * case.query, 100 * case.key, case.value, backend="triton")
    assert torch.isfinite(result).all()
