"""The host's device layer: its numbers are torch's, and it says what a kernel does wrong."""

import pytest
import torch

from ..kernels.tolerance import assert_close, exactly


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
    9: "global memory is accessed before griddepcontrol.wait, while the previous kernel may still run",
}


@pytest.mark.parametrize("which", MISUSE)
def test_misuse_is_named(host, which):
    message = host.module.misuse(which, 64)
    assert message.startswith(MISUSE[which]) and bool(message) == bool(MISUSE[which])


def test_only_whole_warps(built):
    assert built.misuse(0, 33) == "threads must be a multiple of 32"


# Where the elements of an operand are that 32 lanes hold in registers, a dimension for each number of its place: size and stride. A place
# counts along the first index of the matrix first. These are the numbers of CuTe's MMA_Traits<SM80_16x8x16_F32F16F16F32_TN> and
# <SM80_16x8x8_…>, for a [M, K], b [N, K] and c [M, N]: lanes in fours and eights, then the elements of a lane.
LANES = {16: ((4, 32), (8, 1)), 8: ((4, 16), (8, 1))}  # of 16 rows, of 8
LAYOUTS = {
    (16, "a"): (*LANES[16], (2, 16), (2, 8), (2, 128)),
    (16, "b"): (*LANES[8], (2, 8), (2, 64)),
    (8, "a"): (*LANES[16], (2, 16), (2, 8)),
    (8, "b"): (*LANES[8], (2, 8)),
    "c": (*LANES[16], (2, 16), (2, 8)),
}
# Of CuTe's Copy_Traits<SM75_U32x4_LDSM_N> and <SM75_U16x8_LDSM_T>, in 16-bit elements of rows of eight, matrix after matrix.
MATRICES = {False: ((32, 2), (2, 1), (4, 64)), True: ((4, 16), (8, 1), (2, 8), (4, 64))}


def places(layout):
    """[32 lanes, elements of a lane]: where each of them belongs."""
    place = torch.zeros(1, dtype=torch.int64)
    for size, stride in reversed(layout):  # the first number is the one that changes fastest
        place = (place[:, None] + stride * torch.arange(size)).flatten()
    return place.reshape(-1, 32).T


@pytest.mark.models
@pytest.mark.numeric
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("k", (16, 8))
def test_products_have_the_layout_of_the_hardware(built, k, dtype):
    a, b, c = torch.randn(16, k).to(dtype), torch.randn(8, k).to(dtype), torch.randn(16, 8)
    held = [x.T.flatten()[places(layout)].contiguous() for x, layout in ((a, LAYOUTS[k, "a"]), (b, LAYOUTS[k, "b"]), (c, LAYOUTS["c"]))]
    assert [x.shape[1] for x in held] == [k // 2, k // 4, 4]
    assert built.multiply_fragments(dtype == torch.float16, k, *(x.data_ptr() for x in held)) == ""
    found = torch.empty(16 * 8)
    found[places(LAYOUTS["c"])] = held[2]
    assert_close(found.reshape(8, 16).T, *exactly(lambda: c.double() + a.double() @ b.double().T))


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("matrices", (4, 2))
def test_matrices_are_loaded_with_the_layout_of_the_hardware(built, matrices, transposed):
    rows = torch.arange(matrices * 64, dtype=torch.int16)
    found = torch.empty(32, 2 * matrices, dtype=torch.int16)
    storage = torch.empty(len(rows) + 8, dtype=torch.int16)
    aligned = storage[-storage.data_ptr() % 16 // 2 :][: len(rows)].copy_(rows)
    assert built.load_fragments(matrices, transposed, aligned.data_ptr(), found.data_ptr()) == ""
    assert torch.equal(found, rows[places(MATRICES[transposed])[:, : 2 * matrices]])
