"""`fused_edited_attention`: the same as its parts."""

import re

import pytest
import torch

from perfusion_kernels import edited_attention, fused_edited_attention

from . import cases
from .tolerance import assert_no_worse, exactly

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_is_projection_then_edited_attention(dtype):
    case = cases.make(dtype=dtype, T=77)

    def parts(case):
        arguments = case.arguments("edited_attention")
        for name, weight in (("key", case.key_weight), ("value", case.value_weight)):
            arguments[name] = (case.encodings @ weight.T).unflatten(-1, case.query.shape[2:])
        return edited_attention(**arguments, backend="reference")

    result = fused_edited_attention(**case.arguments("fused_edited_attention"))
    assert_no_worse(result, parts(case), *exactly(parts, case.double()), case.index)


def test_rows_without_a_concept_are_the_unedited_layer():
    case = cases.make(B=6)
    result = fused_edited_attention(**case.arguments("fused_edited_attention"))
    unedited = torch.full_like(case.index, -1)
    plain = fused_edited_attention(**{**case.arguments("fused_edited_attention"), "index": unedited})
    none = (case.index < 0).all(-1)
    assert none.any() and torch.equal(result[none], plain[none]) and not torch.equal(result[~none], plain[~none])


def test_refusals_of_shapes():
    arguments = cases.make().arguments("fused_edited_attention")
    message = (
        "value_weight must have shape [H*d, D] with"
        " H = 3 (from query), d = 8 (from query), D = 19 (from encodings); got [23, 19]"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        fused_edited_attention(**{**arguments, "value_weight": arguments["value_weight"][1:]})
    with pytest.raises(ValueError, match="encodings must have at least one position; got T = 0"):
        fused_edited_attention(**{**arguments, "encodings": arguments["encodings"][:, :0]})
