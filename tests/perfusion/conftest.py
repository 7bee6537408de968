"""Tiny pipelines that the hook is attached to, one for each file of tests."""

import pytest
import torch
import transformers

from perfusion.base import describe_base
from perfusion.handle import attach
from tests.perfusion.editing import attached_to, attached_with_two, draw, make_concept
from tests.perfusion.tiny import tiny_sd, tiny_sdxl


@pytest.fixture(scope="session", autouse=True)
def encoders_in_float64():
    """transformers 4 makes CLIP's mask in the default dtype, where the least float64 has no place: exact results need it to be float64."""
    if not transformers.__version__.startswith("4."):
        yield
        return
    from transformers.modeling_attn_mask_utils import AttentionMaskConverter

    make = AttentionMaskConverter._make_causal_mask

    def made(shape, dtype, *rest, **options):
        if dtype != torch.float64:
            return make(shape, dtype, *rest, **options)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return make(shape, dtype, *rest, **options)
        finally:
            torch.set_default_dtype(before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionMaskConverter, "_make_causal_mask", staticmethod(made))
        yield


@pytest.fixture(scope="module")
def sd():
    pipe = tiny_sd()
    draw(pipe, "a cat")  # transformers sets hooks of its own at the first call
    return pipe


@pytest.fixture(scope="module")
def sdxl():
    pipe = tiny_sdxl()
    draw(pipe, "a cat")
    return pipe


@pytest.fixture(scope="module")
def teddy(sd):
    return make_concept(describe_base(sd), "teddy")


@pytest.fixture
def attached(sd, teddy):
    """The shared pipeline, attached, with <teddy>; a test that leaves a hook fails."""
    with attached_to(sd, teddy) as handle:
        yield handle


@pytest.fixture
def fresh(teddy):
    """A pipeline of its own, attached, for tests that change its weights or modules."""
    pipe = tiny_sd()
    with attach(pipe) as handle:
        handle.load(teddy)
        yield pipe


@pytest.fixture
def pipe():
    """A pipeline of its own."""
    return tiny_sd()


@pytest.fixture
def handle(pipe):
    """`pipe`, attached, with <teddy> and <teapot>."""
    with attached_with_two(pipe) as handle:
        yield handle
