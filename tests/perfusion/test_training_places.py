"""Where a caption's concept is read: i* is taken there, whatever words of several tokens stand before it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perfusion.base import describe_base
from perfusion.training.data import read_pictures
from perfusion.training.session import TrainingSession
from tests.perfusion.learning import covariance_of, write_pictures
from tests.perfusion.learning import settings as config_of
from tests.perfusion.tiny import SPLIT_WORDS, tiny_sd, tiny_sdxl

VECTORS = {"<style>": 1, "<wide>": 3, "<long>": 5}
WORDS = ("a", "photo", "of", "red", "teddy", "on", "beach", ",", *SPLIT_WORDS, *VECTORS)
pytestmark = pytest.mark.filterwarnings("ignore:.*few. a concept takes")


def invert(pipe, vectors=VECTORS):
    """Textual inversions of several vectors in every encoder of the pipeline."""
    for number, suffix in enumerate(("", "_2")):
        encoder = getattr(pipe, f"text_encoder{suffix}", None)
        if encoder is not None:
            tokenizer, width = getattr(pipe, f"tokenizer{suffix}"), encoder.get_input_embeddings().embedding_dim
            for token, count in vectors.items():
                count = count if isinstance(count, int) else count[number]
                pipe.load_textual_inversion(torch.randn(count, width), token=token, text_encoder=encoder, tokenizer=tokenizer)
    return pipe


@pytest.fixture(scope="module", params=[tiny_sd, tiny_sdxl], ids=["sd", "sdxl"])
def session(request, tmp_path_factory):
    pipe, config = invert(request.param()), config_of(instance_prompts="a {}")
    pictures = read_pictures(write_pictures(tmp_path_factory.mktemp("places") / "in"), config, 16)
    with TrainingSession(pipe, describe_base(pipe), config, covariance_of(pipe), pictures) as session:
        yield session


def tokens_of(pipe, word):
    return VECTORS[word] if word in VECTORS else len(pipe.tokenizer(word, add_special_tokens=False).input_ids)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(before=st.lists(st.sampled_from(WORDS), max_size=8), after=st.lists(st.sampled_from(WORDS), max_size=3))
def test_the_concepts_token_is_found_behind_any_words(session, before, after):
    caption = " ".join([*before, "<mine>", *after])
    expected = 1 + sum(tokens_of(session.pipe, word) for word in before)
    assert session._find_places([caption]) == [expected]
    # and the encoder's own view of it: the learned embedding stands there, and nowhere else
    seen = []
    embedding = session.pipe.text_encoder.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    word = session.words[0].data.clone()
    try:
        session.words[0].data.fill_(7.0)
        session._read([caption])
    finally:
        handle.remove()
        session.words[0].data.copy_(word)
    assert (seen[0][0] == 7.0).all(-1).nonzero().flatten().tolist() == [expected]


def test_two_encoders_that_read_it_at_different_places_are_refused(tmp_path):
    pipe, config = invert(tiny_sdxl(), {"<odd>": (2, 4)}), config_of(instance_prompts="an <odd> {}")
    pictures = read_pictures(write_pictures(tmp_path / "in"), config, 16)
    with pytest.raises(ValueError, match=r"caption 'an <odd> <mine>' of .*0\.png.*: a textual inversion in it has more vectors"):
        with TrainingSession(pipe, describe_base(pipe), config, covariance_of(pipe), pictures):
            pass
