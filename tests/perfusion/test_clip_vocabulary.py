"""CLIP's tokenizer from what the package ships: the published ids."""

import gzip
from importlib import metadata

import pytest

from perfusion.clip_vocabulary import _merges, clip_tokenizer
from perfusion.prompts import parse_prompt


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer()


def test_the_published_ids(tokenizer):
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("a photo of a dog").input_ids == [49406, 320, 1125, 539, 320, 1929, 49407]
    assert tokenizer("A PHOTO of a Cat!").input_ids == [49406, 320, 1125, 539, 320, 2368, 256, 49407]
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
    assert clip_tokenizer("!").pad_token_id == 0


@pytest.mark.parametrize("word", ["teddy", "dog", "cat", "teapot", "mug", "cup", "boat", "car", "house", "robot", "fish", "toy", "bag", "person"])
def test_usual_superclasses_are_one_token(tokenizer, word):
    assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1


@pytest.mark.parametrize("mark", [",", ".", "!", "?", "'s", ")", " ,", "-"])
def test_punctuation_after_a_concept_does_not_touch_its_superclass(tokenizer, mark):
    (teddy,) = tokenizer("teddy", add_special_tokens=False).input_ids
    text = parse_prompt(f"a <mine>{mark} on a beach", {"mine": "teddy"}).text
    assert tokenizer(text).input_ids[2] == teddy


def test_a_text_is_cut_at_77_tokens(tokenizer):
    ids = tokenizer(" ".join(["cat"] * 100), truncation=True, max_length=77).input_ids
    assert len(ids) == 77 and ids[-1] == 49407


def test_the_merges_are_those_of_the_package_that_publishes_them():
    """open_clip_torch has the whole file, of which CLIP uses the first 48,894 merges."""
    try:
        files = metadata.files("open_clip_torch") or []
    except metadata.PackageNotFoundError:
        pytest.skip("open_clip_torch is not installed")
    (path,) = [file.locate() for file in files if file.name == "bpe_simple_vocab_16e6.txt.gz"]
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    assert _merges().splitlines() == lines[1 : 1 + 49408 - 2 - 512]
