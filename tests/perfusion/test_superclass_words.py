"""Superclasses of several tokens or words: learned, saved, drawn, combined. The concept stands at the last token."""

import pytest
import torch

from perfusion.base import describe_base
from perfusion.concept import Concept
from perfusion.handle import attach
from perfusion.training.data import read_pictures
from perfusion.training.session import TrainingSession
from tests.kernels.tolerance import as_run, assert_same_run
from tests.perfusion.editing import check_rows, draw, make_concept, seen, use
from tests.perfusion.learning import covariance_of, learn, same, settings, write_pictures
from tests.perfusion.tiny import tiny_sd, tiny_sdxl

PHRASES = ["toy boat", "armadillo", "fluffy toy armadillo"]
pytestmark = pytest.mark.filterwarnings("ignore:.*few. a concept takes", "ignore:superclass .* becomes")


@pytest.fixture(scope="module", params=[tiny_sd, tiny_sdxl], ids=["sd", "sdxl"])
def pipe(request):
    pipe = request.param()
    draw(pipe, "a cat")
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("words") / "in")


def encode(pipe, prompt):
    return pipe.encode_prompt(prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]


def embedded(pipe, prompt):
    """What the first encoder's layers read for a prompt [T, width], and the places of its tokens."""
    found = []
    handle = pipe.text_encoder.get_input_embeddings().register_forward_hook(lambda module, args, output: found.append(output.detach()))
    try:
        encode(pipe, prompt)
    finally:
        handle.remove()
    return found[0][0]


def last_place(pipe, before, phrase):
    return 1 + len(pipe.tokenizer(f"{before} {phrase}", add_special_tokens=False).input_ids) - 1


@pytest.mark.parametrize("phrase", PHRASES)
def test_only_the_last_token_is_the_concepts_own(pipe, phrase):
    concept = make_concept(describe_base(pipe), "mine", superclass=phrase)
    plain = embedded(pipe, f"a photo of a {phrase} on a beach")
    with attach(pipe) as handle:
        handle.load(concept)
        changed = embedded(pipe, "a photo of a <mine> on a beach")
    place = last_place(pipe, "a photo of a", phrase)
    assert torch.equal(changed[place], concept.word_embeddings[0])
    rest = torch.arange(77) != place
    assert torch.equal(changed[rest], plain[rest]) and not torch.equal(changed[place], plain[place])


@pytest.mark.numeric
@pytest.mark.parametrize("phrase", PHRASES)
def test_it_is_drawn_by_equation_3_and_at_strength_0_is_the_superclass(pipe, phrase):
    concept = make_concept(describe_base(pipe), "mine", superclass=phrase)
    expected = draw(pipe, f"a {phrase} on a beach")
    with attach(pipe) as handle:
        handle.load(concept)
        assert torch.equal(draw(pipe, "a <mine:0> on a beach"), expected)
        image, forwards = seen(pipe, "a <mine> on a beach", guidance_scale=5.0)
        check_rows(pipe.unet, forwards[0], [[], [use(concept)]])
        assert not torch.equal(image, expected)
        handle.set("mine", key_lock="global")
        plain = encode(pipe, f"a {phrase} on a beach")[0]
        _, forwards = seen(pipe, "a <mine> on a beach", guidance_scale=5.0)
        check_rows(pipe.unet, forwards[0], [[], [use(concept)]], keys={1: plain})


@pytest.mark.numeric
def test_two_of_them_are_combined_by_equation_4(pipe):
    one, other = (make_concept(describe_base(pipe), name, seed=seed, superclass=phrase) for name, seed, phrase in
                  (("one", 1, "toy boat"), ("other", 2, "armadillo")))  # fmt: skip
    with attach(pipe) as handle:
        handle.load(one)
        handle.load(other)
        _, forwards = seen(pipe, "a <one> next to an <other> on a beach", guidance_scale=5.0)
        check_rows(pipe.unet, forwards[0], [[], [use(one), use(other)]])
        read = embedded(pipe, "a <one> next to an <other>, and a <one>")
    places = (read[:, None] == torch.stack([one.word_embeddings[0], other.word_embeddings[0]])).all(-1)
    assert places.sum(0).tolist() == [2, 1]


@pytest.mark.numeric
@pytest.mark.parametrize("phrase", PHRASES)
def test_i_star_and_s_are_taken_at_the_last_token(pipe, folder, phrase):
    config = settings(superclass=phrase, instance_prompts=("a {}", "a photo of a {} on a beach"), ema_decay=0.0)

    def at_the_last_tokens():
        encodings = encode(pipe, [f"a {phrase}", f"a photo of a {phrase} on a beach"])
        places = [last_place(pipe, before, phrase) for before in ("a", "a photo of a")]
        return torch.stack([encodings[row, place] for row, place in enumerate(places)]).mean(0)

    with torch.no_grad():
        s = as_run(at_the_last_tokens)
    with TrainingSession(pipe, describe_base(pipe), config, covariance_of(pipe), read_pictures(folder, config, 16)) as session:
        assert_same_run(session.superclass_encoding, s)
        session.words[0].data.add_(0.3)
        batch = session._draw()

        def at_its_word():
            made = session._read(batch.captions)[0]
            own = [last_place(pipe, caption.split(" <mine>")[0], phrase) for caption in batch.captions]
            return torch.stack([made[row, place] for row, place in enumerate(own)]).mean(0)

        with torch.no_grad():
            moved = as_run(at_its_word)
        session.train_step()
        assert_same_run(session.target, moved)


def test_it_is_learned_saved_and_drawn(pipe, folder, tmp_path):
    concept = learn(pipe, folder, superclass="stuffed armadillo", output=tmp_path, steps=3, learning_rate=0.3, validation_prompts="a {}")
    loaded = Concept.load(tmp_path / "mine.safetensors")
    assert loaded.superclass == "stuffed armadillo" and (tmp_path / "gallery.png").exists()
    plain = draw(pipe, "a photo of a stuffed armadillo")
    with attach(pipe) as handle:
        handle.load(loaded)
        image = draw(pipe, "a photo of a <mine>")
    assert not torch.equal(image, plain)
    assert same(concept, learn(pipe, folder, superclass="stuffed armadillo", steps=3, learning_rate=0.3))


def test_a_superclass_at_the_end_of_77_tokens(pipe):
    with attach(pipe) as handle:
        handle.load(make_concept(handle.base, "mine", superclass="toy boat"))
        handle.check([" ".join(["red"] * 73) + " <mine>"])  # its last token is the 76th, before the end
        with pytest.raises(ValueError, match="<mine> lies beyond the 77 tokens"):
            handle.check([" ".join(["red"] * 74) + " <mine>"])
