"""What a program holds in shared memory: tiles that fit, and a refusal where none do."""

import pytest
import torch

from perfusion_kernels import BackendUnavailable, edited_attention
from perfusion_kernels.triton import edited_attention as forward
from perfusion_kernels.triton import edited_attention_backward as backward
from perfusion_kernels.triton import fused_edited_attention as fused
from perfusion_kernels.triton import shared_memory

from . import cases
from .tolerance import assert_close, exactly

KIB = 1024
HALF, SINGLE = torch.float16, torch.float32
DEVICE = torch.device(cases.runs("edited_attention")[-1][1])


@pytest.fixture
def limit(monkeypatch):
    return lambda kib: monkeypatch.setattr(shared_memory, "limit", lambda device: kib * KIB)


def test_the_first_tiles_that_fit_are_taken(limit):
    """The derivatives of Stable Diffusion 1.5's widest heads want 115 KiB with 64 queries, 95 with 32, 85 with 16."""
    listed, held = backward.tiles_by_query(77, 160, HALF), backward.held_by_query(77, 160, HALF)
    assert [each["BLOCK_N"] for each in listed] == [16, 32, 64]
    for kib, blocks in ((227, [16, 32, 64]), (99, [16, 32]), (48, [])):
        limit(kib)
        assert [each["BLOCK_N"] for each in shared_memory.fitting(listed, held, DEVICE)] == blocks


@pytest.mark.parametrize("d", (40, 64, 80, 160))
def test_half_precision_fits_everywhere_at_77_tokens(limit, d):
    limit(99)
    for module, tiles in ((forward, "tiles"), (fused, "tiles")):
        assert shared_memory.fitting(getattr(module, tiles)(77, d, HALF), module.held(77, d, HALF), DEVICE)
    assert backward.unsupported_gradients(torch.empty(1, 1, 1, d, dtype=HALF), 77, d) is None


@pytest.mark.numeric
def test_what_does_not_fit_is_refused_and_left_to_others(limit):
    """float32 at d = 160: 100 KiB of keys and values alone, where 8.6, 8.9 and 12.0 have 99."""
    case = cases.make(B=1, T=77, J=1, H=1, d=160, N=3, device=str(DEVICE))
    for operator in ("edited_attention", "fused_edited_attention"):
        limit(163)
        assert cases.PUBLIC[operator](**case.arguments(operator), backend="triton").isfinite().all()
        limit(99)
        with pytest.raises(BackendUnavailable, match=r"hold \d+ bytes in shared memory, where .* has 101376;.*Can run it: .*reference"):
            cases.PUBLIC[operator](**case.arguments(operator), backend="triton")
    limit(117)  # enough forward, not backward, which plain torch takes over

    def gradient(case, backend):
        query = case.query.clone().requires_grad_()
        edited_attention(query, case.key, case.value, backend=backend).sum().backward()
        return query.grad

    assert_close(gradient(case, "triton"), *exactly(gradient, case.double(), "reference"))


def test_other_devices_have_no_limit():
    assert shared_memory.limit(torch.device("cpu")) is None
    tiles = ({"BLOCK_N": 1 << 30},)
    assert shared_memory.fitting(tiles, lambda each: each["BLOCK_N"], torch.device("cpu")) == tiles

