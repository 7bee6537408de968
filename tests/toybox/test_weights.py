"""The toybox that is shipped: its size, and that it is as good as is published of it (weights/scores.json, docs/toybox.md)."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from perfusion.covariance import Covariance
from perfusion.models import TOYBOX, load_pipeline
from perfusion.toybox.judge import load_judge
from perfusion.toybox.model import make_readable_by_transformers_4
from perfusion.toybox.score import accuracy, draw, held_out, judge_accuracy, one_prompts

pytestmark = pytest.mark.toybox


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("toybox", device="cpu")


@pytest.fixture(scope="module")
def judge():
    return load_judge(TOYBOX / "judge.safetensors")


@pytest.mark.smoke
def test_it_is_small():
    assert sum(path.stat().st_size for path in TOYBOX.rglob("*") if path.is_file()) <= 16 * 2**20


@pytest.mark.smoke
def test_both_majors_of_transformers_read_it(tmp_path):
    """What `make_readable_by_transformers_4` writes is there, and what transformers 5 reads is unchanged by it."""
    shutil.copytree(TOYBOX, tmp_path / "weights")
    make_readable_by_transformers_4(tmp_path / "weights")
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt"):
        assert (tmp_path / "weights" / name).read_bytes() == (TOYBOX / name).read_bytes(), name
    before, after = (load_file(folder / "text_encoder/model.safetensors") for folder in (TOYBOX, tmp_path / "weights"))
    assert before.keys() == after.keys() and all(name.startswith("text_model.") for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_judge_is_right_on_pictures_it_has_not_seen(judge):
    found = judge_accuracy(judge, *held_out(1024, seed=123))
    published = json.loads((TOYBOX / "scores.json").read_text())["judge"]
    for label in ("object", "colour", "pattern", "scene", "relation", "style", "size"):
        assert found[label] >= published[label] - 0.02, found  # about 570 coloured things alone: three standard errors and more


def test_the_base_model_draws_what_it_is_told(pipe, judge):
    prompts, truth = one_prompts(96, seed=7)
    found = accuracy(judge.read(draw(pipe, prompts, seed=7)), truth)
    published = json.loads((TOYBOX / "scores.json").read_text())["one thing"]
    for label in ("object", "scene", "colour"):
        assert found[label] >= published[label] - 0.09, found  # 96 pictures: two standard errors


@pytest.mark.smoke
def test_the_covariance_is_its_own(pipe):
    from perfusion.base import fingerprints_match, text_encoder_fingerprint

    covariance = Covariance.load(TOYBOX / "covariance.safetensors")
    assert fingerprints_match(covariance.text_encoder, text_encoder_fingerprint(pipe))
    assert covariance.captions >= 20_000
    assert covariance.condition <= 1e6 * 1.001
