"""What the text encoder is taught, and that a learned word's gate opens at that word alone, wherever it stands."""

import itertools

import pytest
import torch

from perfusion.covariance import Covariance
from perfusion.models import TOYBOX, load_pipeline
from perfusion.toybox.model import ENCODING_DIM, MAX_TOKENS, token_ids, vocabulary
from perfusion.toybox.recipe.text_encoder import encode_embeddings
from perfusion.toybox.text import EMBEDDING_SCALE, codes, targets_of
from perfusion.toybox.words import SCENES

pytestmark = pytest.mark.toybox


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("toybox", device="cpu")


def meaning(caption, place):
    ids = {word: number for number, word in enumerate(vocabulary())}
    table = torch.eye(len(codes(len(ids), 1)))
    found = targets_of([caption.split()], ids, len(ids), MAX_TOKENS, table)[0, place]
    names = {number: word for word, number in ids.items()}
    return {names.get(index, index - len(ids)): round(found[index].item(), 2) for index in found.nonzero().flatten().tolist()}


def test_a_noun_says_its_own_phrase_and_the_relation_of_the_second():
    caption = "a small red striped teddy in a blue mug in the snow"
    assert meaning(caption, 5) == {"teddy": 1, "small": 0.7, "red": 0.9, "striped": 0.9}
    assert meaning(caption, 9) == {"mug": 1, "blue": 0.9, 3: 0.7}  # after start and end: alone, in, on, next to
    assert meaning(caption, 4) == {"striped": 1}
    assert meaning("in the snow a mug", 5) == {"mug": 1}  # the scene's "in" is no relation
    assert meaning("a teddy next to a mug", 6) == {"mug": 1, 5: 0.7}
    end = meaning(caption, 13)
    assert end == {1: 1, 3: 1, 6 + list(SCENES).index("snow"): 1, 6 + len(SCENES): 1}  # the end, in, snow, photo


def component(pipe, covariance, texts, words, target):
    """Components on `target` of every token of each text, in which `words` have embeddings of their own: [n, 32]."""
    ids = token_ids(pipe.tokenizer, texts)
    embeddings = pipe.text_encoder.get_input_embeddings().weight[ids].clone()
    for row, text in enumerate(texts):
        for place, word in enumerate(text.split(), start=1):
            if word in words:
                embeddings[row, place] = words[word]
    encoded = encode_embeddings(pipe.text_encoder, embeddings).double()
    if target is None:
        return encoded
    solved = torch.linalg.solve(covariance.matrix.double(), target)
    return encoded @ solved / (target @ solved)


@torch.no_grad()
def test_a_learned_words_gate_opens_at_its_own_word_alone(pipe):
    """Two new words near their superclasses, in every order, with adjectives and without, in front of scenes and behind them."""
    covariance = Covariance.load(TOYBOX / "covariance.safetensors")
    generator = torch.Generator().manual_seed(0)
    table = pipe.text_encoder.get_input_embeddings().weight
    nouns = token_ids(pipe.tokenizer, ["teddy teapot"])[0, 1:3]
    frames = ["a {} on the beach", "a photo of a {} at night", "in the snow a {}", "a picture of a {} in a room"]
    own, elsewhere = [], []
    for distance in (0.2, 0.5):
        noise = EMBEDDING_SCALE * distance * torch.randn(2, ENCODING_DIM, generator=generator)
        words = dict(zip(("any", "some"), table[nouns] + noise))
        learned = {}
        for word in words:
            texts = [frame.format(word) for frame in frames]
            places = [text.split().index(word) + 1 for text in texts]
            learned[word] = component(pipe, covariance, texts, words, None)[range(len(frames)), places].mean(0)
        texts = [
            f"{front}a {adjective}{first} {relation} a {second}{back}"
            for (first, second), relation, adjective in itertools.product(
                (("any", "some"), ("some", "any"), ("any", "teddy"), ("teddy", "any")), ("in", "on", "next to"), ("", "red ", "small dotted ")
            )
            for front, back in (("", " in the city"), ("at night ", ""))
        ]
        for word, target in learned.items():
            found = component(pipe, covariance, texts, words, target)
            for row, text in zip(found, texts):
                spoken = text.split()
                own += [row[place].item() for place, said in enumerate(spoken, start=1) if said == word]
                elsewhere += [row[place].item() for place, said in enumerate(spoken, start=1) if said != word]
    gate = lambda c: torch.sigmoid((torch.tensor(c) - 0.70) / 0.15)  # noqa: E731  as it is set by default
    assert gate(own).min() > 0.75 and gate(elsewhere).max() < 0.10
