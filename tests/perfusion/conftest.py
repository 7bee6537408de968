"""Tiny pipelines that the hook is attached to, one for each file of tests."""

import pytest

from perfusion.base import describe_base
from perfusion.handle import attach
from tests.perfusion.editing import attached_to, draw, make_concept
from tests.perfusion.tiny import tiny_sd, tiny_sdxl


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
