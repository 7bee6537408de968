"""The host's device layer: its numbers are torch's, and it says what a kernel does wrong."""

import pytest
import torch


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_widening_is_torch_s(built, dtype):
    """All 65,536 patterns; NaN is NaN."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    wide = torch.empty(2**16)
    built.convert(dtype == torch.float16, bits.data_ptr(), wide.data_ptr(), 2**16, True)
    expected = bits.view(dtype).float()
    assert torch.equal(wide.isnan(), expected.isnan())
    assert torch.equal(wide.nan_to_num(0.0).view(torch.int32), expected.nan_to_num(0.0).view(torch.int32))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_rounding_is_torch_s(built, dtype):
    """Every value of the type, the midpoints between neighbours, and a step to either side of both."""
    values = torch.arange(0, 2**16).to(torch.int32).to(torch.int16).view(dtype).float()
    values = values[values.isfinite()]
    ordered = values.sort().values
    middles = ((ordered[1:].double() + ordered[:-1].double()) / 2).float()
    finite = torch.cat([ordered, middles])
    up, down = (torch.nextafter(finite, torch.tensor(sign * torch.inf)) for sign in (1, -1))
    wide = torch.cat([finite, up, down, torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.996, 65520.0, 1e38, 3.4e38, 1e-45])])
    narrow = torch.empty(len(wide), dtype=dtype)
    built.convert(dtype == torch.float16, narrow.data_ptr(), wide.data_ptr(), len(wide), False)
    expected = wide.to(dtype)
    assert torch.equal(narrow.isnan(), expected.isnan())
    assert torch.equal(narrow.nan_to_num(0.0).view(torch.int16), expected.nan_to_num(0.0).view(torch.int16))


MISUSE = {
    0: "",
    1: "63 threads wait at a barrier and 0 for their warp, 1 have returned",
    2: "lanes of one warp are at shuffle_xor and at load_matrices of 4",
    3: "load_matrices: the address is not 16-byte aligned",
    4: "the copy has not landed",
    5: "the copy has not landed",
    6: "the copy has not landed",
    7: "the write has not been seen",
    8: "copy_async: bytes must lie in 0 ... 16",
}


@pytest.mark.parametrize("which", MISUSE)
def test_misuse_is_named(host, which):
    message = host.module.misuse(which, 64)
    assert message.startswith(MISUSE[which]) and bool(message) == bool(MISUSE[which])


def test_only_whole_warps(built):
    assert built.misuse(0, 33) == "threads must be a multiple of 32"
