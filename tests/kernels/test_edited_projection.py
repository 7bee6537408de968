"""`edited_projection`, separate and fused: rows without a concept, and slots seen through the index."""

import pytest
import torch

from perfusion_kernels import edited_projection, fused_edited_projection

from . import cases, plain
from .tolerance import assert_close, assert_rounded_once, exactly

pytestmark = pytest.mark.numeric

each_run = pytest.mark.parametrize("backend, device", cases.runs("edited_projection"))
each_run_and_dtype = pytest.mark.parametrize(
    "backend, device, dtype",
    [
        (backend, device, dtype)
        for backend, device in cases.runs("edited_projection")
        for dtype in cases.FLOATING
        if cases.takes("edited_projection", backend, dtype)
    ],
)


@each_run_and_dtype
@pytest.mark.parametrize("J", (0, 1, 4))
def test_rows_without_a_concept_are_the_linear_layer(backend, device, dtype, J):
    """Bit for bit, signs of zeros included, in a batch where other rows have concepts; by compiled kernels, those of their unedited call."""
    arguments = cases.make(B=6, J=J, dtype=dtype, device=device, backend=backend).arguments("edited_projection")
    arguments["weight"][0], arguments["encodings"][..., 0] = 0, 1e-4
    arguments["weight"][0, 0] = -1e-4  # in float16 the product is -0.0, and -0.0 + 0.0 would be 0.0
    result = edited_projection(**arguments, backend=backend)
    if backend == "cuda":
        linear = edited_projection(**{**arguments, "index": torch.full_like(arguments["index"], -1)}, backend=backend)
    else:
        linear = torch.nn.functional.linear(arguments["encodings"], arguments["weight"])
    none = (arguments["index"] < 0).all(-1)
    assert dtype != torch.float16 or bits(linear[none]).min() == torch.iinfo(torch.int16).min
    assert none.any() and (J == 0 or not none.all())
    assert torch.equal(bits(result[none]), bits(linear[none]))
    assert not any(torch.equal(result[row], linear[row]) for row in range(6) if not none[row])


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@each_run
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_edit_is_added_before_rounding(backend, device, dtype):
    """The edited result is the linear layer's plus the exact edit, rounded once: large terms may cancel."""
    arguments = cases.make(J=3, dtype=dtype, device=device, backend=backend).arguments("edited_projection")
    arguments["gates"], arguments["components"] = 30 * arguments["gates"], 30 * arguments["components"]
    exact = {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}
    linear = torch.nn.functional.linear(arguments["encodings"], arguments["weight"]).double()
    exact |= {"encodings": linear, "weight": torch.eye(linear.shape[-1]).to(linear)}
    (once,) = exactly(plain.edited_projection, *cases.positional("edited_projection", exact))
    assert_rounded_once(edited_projection(**arguments, backend=backend), once)


@each_run
def test_slots_may_be_anywhere_in_the_bank(backend, device):
    """Moving concepts to other slots and renaming them in the index changes nothing."""
    arguments = cases.make(S=6, device=device, backend=backend).arguments("edited_projection")
    order = torch.tensor([3, 0, 5, 1, 4, 2], device=device)
    place = torch.argsort(order)
    moved = {
        **arguments,
        "index": torch.where(arguments["index"] < 0, -1, place[arguments["index"].clamp(min=0).long()]).int(),
        "outputs": arguments["outputs"][order],
        "projected_targets": arguments["projected_targets"][order],
    }
    assert torch.equal(edited_projection(**moved, backend=backend), edited_projection(**arguments, backend=backend))


@each_run
def test_gradient_of_a_shared_slot_is_the_sum_over_rows(backend, device):
    arguments = cases.make(B=4, J=1, device=device, backend=backend).arguments("edited_projection")
    arguments["index"] = torch.tensor([[1], [1], [-1], [2]], dtype=torch.int32, device=device)
    arguments["gates"] = torch.rand_like(arguments["gates"])
    arguments["components"] = torch.rand_like(arguments["components"])
    arguments["outputs"] = arguments["outputs"].requires_grad_()
    edited_projection(**arguments, backend=backend).sum().backward()

    def expected(gates):
        sums = gates[..., 0].sum(-1)
        return torch.stack([torch.zeros_like(sums[0]), sums[0] + sums[1], sums[3]])

    assert_close(arguments["outputs"].grad[:3, 0], *exactly(expected, arguments["gates"].double()))


def test_values_that_are_not_finite_are_refused_where_used():
    arguments = cases.make().arguments("edited_projection")  # NaN in unused places already
    for name in ("gates", "components"):
        wrong = arguments[name].clone()
        wrong[1, 0, 0] = torch.inf
        with pytest.raises(ValueError, match=f"edited_projection: {name} must be finite where index names a concept"):
            edited_projection(**{**arguments, name: wrong})


@each_run_and_dtype
def test_fused_rows_without_a_concept_are_those_of_the_unedited_call(backend, device, dtype):
    """Bit for bit, whatever the other rows have; but not those of the library, which is why `edited_projection` is there."""
    arguments = cases.make(B=6, T=35, J=3, dtype=dtype, device=device, backend=backend).arguments("fused_edited_projection")
    result = fused_edited_projection(**arguments, backend=backend)
    unedited = fused_edited_projection(**{**arguments, "index": torch.full_like(arguments["index"], -1)}, backend=backend)
    none = (arguments["index"] < 0).all(-1)
    assert none.any() and torch.equal(bits(result[none]), bits(unedited[none]))
    assert not any(torch.equal(result[row], unedited[row]) for row in range(6) if not none[row])


@pytest.mark.parametrize("backend, device", cases.runs("fused_edited_projection"))
def test_fused_results_are_rounded_once(backend, device):
    """Product and edit may cancel: the error is half a unit of the result, not of the product."""
    arguments = cases.make(J=2, dtype=torch.bfloat16, device=device, backend=backend).arguments("fused_edited_projection")
    exact = {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}
    (exact,) = exactly(plain.edited_projection, *cases.positional("fused_edited_projection", exact))
    assert_rounded_once(fused_edited_projection(**arguments, backend=backend), exact)
