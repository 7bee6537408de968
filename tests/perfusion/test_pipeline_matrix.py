"""Each pipeline and option of `docs/pipelines.md`: equal without a concept, edited with one, restored after detach, by the path that
the page says. What it lists as refused is refused by name, with the reason and what to use instead."""

import re

import pytest
import torch

from perfusion.base import UnsupportedPipeline, describe_base
from perfusion.handle import attach
from tests.perfusion.pipeline_matrix import CASES, REFUSED, Case, animatediff, drawn_plainly, row_of, rows, run
from tests.perfusion.tiny import tiny_sd

pytestmark = pytest.mark.pipelines


def largest(a, b, case: Case) -> float:
    """The largest difference, as a part of the tolerance."""
    return float((a - b).abs().max() / b.abs().max() / case.tolerance)


SMOKE = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtSigmaPipeline")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.smoke if name in SMOKE else ()) for name in CASES])
def test_equal_edited_and_restored(name):
    case = CASES[name]
    if case.needs is not None:
        pytest.importorskip(case.needs)
    seen = run(case)
    half = len(seen.mixed) // 2
    assert torch.isfinite(seen.mixed).all()
    assert torch.equal(seen.plain, seen.untouched) and torch.equal(seen.after, seen.untouched) and not seen.leftovers
    assert torch.equal(seen.exact[half:], seen.untouched[half:])
    assert largest(seen.mixed, seen.exact, case) < 1
    assert largest(seen.mixed[:half], seen.untouched[:half], case) > 1.2, "the concept changes nothing"
    if case.neutral:
        assert largest(seen.mixed, drawn_plainly(case.build), case) < 1
    assert rows().get(name) == row_of(case, seen.path), "docs/pipelines.md is stale: python -m tests.perfusion.pipeline_matrix"


@pytest.mark.parametrize("refusal", REFUSED, ids=[refusal.name for refusal in REFUSED])
def test_refused_by_name_with_reason_and_advice(refusal):
    pipe = refusal.build()
    with pytest.raises(UnsupportedPipeline, match=rf"^{type(pipe).__name__} .*{re.escape(refusal.reason)}.*{re.escape(refusal.instead)}"):
        attach(pipe)


def test_a_concept_of_the_image_pipeline_fits_the_video_pipeline_around_its_unet():
    assert describe_base(tiny_sd(unet=dict(attention_head_dim=2))).mismatch(describe_base(animatediff())) is None


@pytest.mark.smoke
def test_the_page_lists_what_is_tested():
    assert list(rows()) == [*CASES, *(refusal.name for refusal in REFUSED)]
    assert all(rows()[refusal.name] == row_of(refusal) for refusal in REFUSED)
