"""`edited_attention`: plain attention, one-sided edits, and its refusals."""

import re

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from perfusion_kernels import edited_attention

from . import cases, plain
from .tolerance import assert_close, assert_no_worse, exactly

pytestmark = pytest.mark.numeric

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def by_torch(query, key, value, scale=None):
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)


def attention_by_hand(query, key, value, scale):
    weights = torch.softmax(torch.einsum("bnhd,bthd->bhnt", query, key) * scale, -1)
    return torch.einsum("bhnt,bthd->bnhd", weights, value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", (None, 0.05))
def test_plain_attention_is_torch_s(dtype, scale):
    case = cases.make(T=77, d=40, dtype=dtype)
    tensors = case.query, case.key, case.value
    (exact,) = exactly(attention_by_hand, *(x.double() for x in tensors), case.key.shape[-1] ** -0.5 if scale is None else scale)
    assert_no_worse(edited_attention(*tensors, scale=scale), by_torch(*tensors, scale), exact, case.index)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_concept_are_plain_attention(dtype):
    case = cases.make(B=6, dtype=dtype)
    result = edited_attention(**case.arguments("edited_attention"))
    unedited = edited_attention(case.query, case.key, case.value)
    none = (case.index < 0).all(-1)
    assert none.any() and torch.equal(result[none], unedited[none])
    assert not torch.equal(result[~none], unedited[~none])


def test_layouts_of_heads_do_not_matter():
    """[B, N, H, d] as views of [B, N, H*d], of [B, H, N, d], and dense."""
    case = cases.make()
    tensors = case.query, case.key, case.value
    (exact,) = exactly(lambda: edited_attention(*(x.double() for x in tensors), backend="reference"))
    for layout in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.flatten(2).unflatten(2, x.shape[2:]),
    ):
        result = edited_attention(*map(layout, tensors))
        assert result.is_contiguous()
        assert_close(result, exact)


@pytest.mark.parametrize("side", ("key", "value"))
def test_one_side_alone(side):
    """With the tables of one side, the other stays; zero tables say the same."""
    case = cases.make()
    arguments = case.arguments("edited_attention")
    other = "value" if side == "key" else "key"
    names = (f"{other}_outputs", f"{other}_targets")
    zeros = {name: torch.zeros_like(arguments[name]) for name in names}
    alone = edited_attention(**{**arguments, **dict.fromkeys(names)})
    wide = {**case.double().arguments("edited_attention"), **{name: x.double() for name, x in zeros.items()}}
    (exact,) = exactly(plain.edited_attention, *cases.positional("edited_attention", wide, case.query.shape[-1] ** -0.5))
    for result in (alone, edited_attention(**{**arguments, **zeros})):
        assert_close(result, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_close(edited_attention(**arguments), exact)


def test_one_side_alone_has_gradients():
    case = cases.make(B=2, T=3, D=4, J=1, H=2, d=2, N=2, dtype=torch.float64)
    arguments = {**case.arguments("edited_attention"), "key_outputs": None, "key_targets": None}
    arguments["gates"], arguments["components"] = (arguments[n].nan_to_num().clone() for n in ("gates", "components"))
    names = ("query", "gates", "components", "value_outputs")
    leaves = [arguments[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *x: edited_attention(**{**arguments, **dict(zip(names, x))}), leaves)


def test_plain_attention_has_gradients():
    case = cases.make(B=2, T=3, D=4, H=2, d=2, N=2, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (case.query, case.key, case.value)]
    assert torch.autograd.gradcheck(edited_attention, leaves)
    assert torch.autograd.gradgradcheck(edited_attention, leaves, fast_mode=True)


def test_large_scores_do_not_overflow():
    case = cases.make(dtype=torch.float16)
    assert torch.isfinite(edited_attention(100 * case.query, 100 * case.key, case.value)).all()


def test_refusals_of_combinations():
    case = cases.make()
    arguments = case.arguments("edited_attention")
    tables = ("key_outputs", "key_targets", "value_outputs", "value_targets")
    for missing, message in (
        (("gates",), "edited_attention: gates must be given with the other edit arguments; got None"),
        (("components", "index"), "edited_attention: components must be given with the other edit arguments; got None"),
        (("key_targets",), "edited_attention: key_targets must be given with key_outputs; got None"),
        (("value_outputs",), "edited_attention: value_outputs must be given with value_targets; got None"),
        (tables, "edited_attention: gates need tables to act on"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            edited_attention(**{**arguments, **dict.fromkeys(missing)})
    with pytest.raises(ValueError, match=re.escape("key must have at least one position; got T = 0")):
        edited_attention(case.query, case.key[:, :0], case.value[:, :0])
    message = "key_outputs must have shape [S, H*d] with H = 3 (from query), d = 8 (from query); got [5, 23]"
    with pytest.raises(ValueError, match=re.escape(message)):
        edited_attention(**{**arguments, "key_outputs": arguments["key_outputs"][:, 1:]})
    with pytest.raises(TypeError, match="value must be float32 .as query.; got float64"):
        edited_attention(case.query, case.key, case.value.double())
