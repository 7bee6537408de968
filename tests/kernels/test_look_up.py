"""The look-up behind every operator of the reference: an absent slot neither gives nor takes."""

import torch

from perfusion_kernels.reference.look_up import look_up, look_up_backward, wide

INDEX = torch.tensor([[1, -1], [-1, -1], [1, 2]], dtype=torch.int32)


def test_an_absent_slot_gives_zeros():
    table = torch.arange(6.0).reshape(3, 2)
    table[0] = torch.nan
    expected = torch.tensor([[[2, 3], [0, 0]], [[0, 0], [0, 0]], [[2, 3], [4, 5]]])
    assert torch.equal(look_up(table, INDEX, torch.float64), expected.double())


def test_an_absent_slot_takes_no_gradient():
    gradient = torch.ones(3, 2, 4)
    gradient[1] = torch.nan
    total = look_up_backward(gradient, torch.empty(3, 4, dtype=torch.float16), INDEX)
    assert total.dtype == torch.float16 and total[:, 0].tolist() == [0, 2, 1]


def test_the_dtype_to_compute_in():
    half, single, double = (torch.empty(0, dtype=x) for x in (torch.float16, torch.float32, torch.float64))
    assert wide(half, half) == wide(half, single) == torch.float32 and wide(half, double) == torch.float64
