"""perfusion.text and perfusion.encoding_registry: the word's embedding in its place, and the encodings that are known again."""

import re

import pytest
import torch
from transformers import AutoTokenizer

from perfusion import encoding_registry as rows_module
from perfusion.base import UnsupportedPipeline
from perfusion.encoding_registry import EncodingRegistry
from perfusion.loaded_concept import LoadedConcept
from perfusion.models import TOYBOX
from perfusion.prompts import Mention, PromptError
from perfusion.requests import RowRequest
from perfusion.text import TextHook, superclass_tokens, warn_of_unknown_word
from tests.perfusion.editing import hooks_of
from tests.perfusion.tiny import tiny_sd, tiny_sdxl


@pytest.fixture(scope="module")
def pipes():
    return {"sd": tiny_sd(), "sdxl": tiny_sdxl()}


@pytest.fixture
def sd(pipes):
    return pipes["sd"]


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request, pipes):
    return pipes[request.param]


@pytest.fixture
def hooked():
    """hook(pipe, teddy=LoadedConcept(...)) installs a TextHook until the test ends."""
    installed = []

    def hook(pipe, **words):
        installed.append(TextHook(pipe, words))
        installed[-1].install()
        return installed[-1]

    yield hook
    for each in installed:
        each.remove()


def pairs(pipe):
    return [(pipe.tokenizer, pipe.text_encoder)] + ([(pipe.tokenizer_2, pipe.text_encoder_2)] if hasattr(pipe, "tokenizer_2") else [])


def embeddings_of(pipe, word):
    return [encoder.get_input_embeddings().weight[superclass_tokens(tokenizer, word)[-1]] for tokenizer, encoder in pairs(pipe)]


def cat(pipe, superclass="teddy", **settings):
    """A concept that is written as its superclass and means cat: what comes out is known."""
    return LoadedConcept(superclass, embeddings_of(pipe, "cat"), **settings)


def encode(pipe, prompt, guidance=False, copies=1, **options):
    return pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=copies, do_classifier_free_guidance=guidance, **options)


def same(left, right):
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(left, right, strict=True))


def names(found):
    return {row: [mention.name for mention in edit.mentions] for row, edit in found.items()}


# In its place


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a {}",
        "{} on a beach",
        "{}",
        "red {}, a blue {}; and {}.",
        "a {}'s hat",
        "(({})), zyx armadillo 12 {}",
        "a " * 70 + "{}",  # far along
    ],
)
def test_the_embedding_takes_the_place_of_the_superclass_word(pipe, hooked, text):
    hooked(pipe, thing=cat(pipe))
    assert same(encode(pipe, text.replace("{}", "<thing>")), encode(pipe, text.replace("{}", "cat")))


def test_a_sequence_of_prompts(pipe, hooked):
    hook = hooked(pipe, thing=cat(pipe), Other=cat(pipe))
    expected = encode(pipe, ["a cat", "a teddy", "a dog on a cat"])
    got = encode(pipe, ["a <thing>", "a teddy", "a dog on a <Thing>"])
    assert same(got, expected)
    assert names(hook.rows_of(got[0])) == {0: ["thing"], 2: ["thing"]}
    assert same(encode(pipe, ("a <thing>", "a teddy", "a dog on a <thing>")), expected)


def test_an_empty_list_is_the_pipelines_own_affair(pipe, hooked):
    def outcome():
        try:
            return tuple(encode(pipe, [])[0].shape)
        except Exception as error:
            return type(error), str(error)

    before = outcome()
    hooked(pipe, thing=cat(pipe))
    assert outcome() == before


def test_images_per_prompt_repeat_their_row(pipe, hooked):
    hook = hooked(pipe, thing=cat(pipe), pot=cat(pipe, "teapot"))
    got = encode(pipe, ["a <thing>", "a <pot>"], copies=2)
    assert same(got, encode(pipe, ["a cat", "a cat"], copies=2))
    got = encode(pipe, ["a <thing>", "a red <pot>"], copies=2)
    assert names(hook.rows_of(got[0])) == {0: ["thing"], 1: ["thing"], 2: ["pot"], 3: ["pot"]}


def test_negative_prompts(pipe, hooked):
    hook = hooked(pipe, thing=cat(pipe))
    expected = encode(pipe, ["a dog", "a cat"], guidance=True, negative_prompt=["a bad cat", "bad"])
    got = encode(pipe, ["a dog", "a <thing>"], guidance=True, negative_prompt=["a bad <thing>", "bad"])
    assert same(got, expected)
    assert names(hook.rows_of(torch.cat([got[1], got[0]]))) == {0: ["thing"], 3: ["thing"]}


def test_a_negative_prompt_without_guidance_is_not_read(pipe, hooked):
    hooked(pipe, thing=cat(pipe))
    assert same(encode(pipe, "a <thing>", negative_prompt="a <thing>"), encode(pipe, "a cat"))


def test_a_pipeline_may_encode_the_negative_prompt_first(hooked):
    pipe = tiny_sd(seed=3)

    def encode_prompt(prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt, own=type(pipe).encode_prompt):
        negative = own(pipe, negative_prompt, device, num_images_per_prompt, False)[0]
        return own(pipe, prompt, device, num_images_per_prompt, False)[0], negative

    pipe.encode_prompt = encode_prompt
    expected = encode(pipe, "a cat", guidance=True, negative_prompt="a bad cat")
    hook = hooked(pipe, thing=cat(pipe))
    got = encode(pipe, "a <thing>", guidance=True, negative_prompt="a bad <thing>")
    assert same(got, expected) and list(hook.rows_of(torch.cat(got))) == [0, 1]


def test_one_negative_prompt_for_a_batch(pipes, hooked):
    pipe = pipes["sdxl"]
    hook = hooked(pipe, thing=cat(pipe))
    expected = encode(pipe, ["a dog", "a cup"], guidance=True, negative_prompt="a cat")
    got = encode(pipe, ["a dog", "a cup"], guidance=True, negative_prompt="a <thing>")
    assert same(got, expected)
    assert names(hook.rows_of(got[1])) == {0: ["thing"], 1: ["thing"]}


def test_the_second_encoder_may_have_its_own_prompt(pipes, hooked):
    pipe = pipes["sdxl"]
    hook = hooked(pipe, thing=cat(pipe), pot=cat(pipe, "teapot"))
    options = dict(guidance=True, negative_prompt="bad")
    expected = encode(pipe, "a cat", prompt_2="red cat", negative_prompt_2="the cat", **options)
    got = encode(pipe, "a <thing>", prompt_2="red <pot>", negative_prompt_2="the <pot>", **options)
    assert same(got, expected)
    assert names(hook.rows_of(torch.cat([got[1], got[0]]))) == {0: ["pot"], 1: ["thing", "pot"]}


def test_strength_moves_the_embedding(pipe, hooked):
    middle = [torch.lerp(a, b, 0.25) for a, b in zip(embeddings_of(pipe, "teddy"), embeddings_of(pipe, "cat"))]
    hooked(pipe, thing=cat(pipe), weak=cat(pipe, strength=0.25), middle=LoadedConcept("teddy", middle))
    expected = encode(pipe, "a <middle>")
    assert same(encode(pipe, "a <thing:0.25>"), expected) and same(encode(pipe, "a <weak>"), expected)
    assert same(encode(pipe, "a <weak:1>"), encode(pipe, "a cat"))


def test_strength_zero_and_disabled_are_the_plain_superclass(pipe, hooked):
    hook = hooked(pipe, thing=cat(pipe), off=cat(pipe, strength=0.0))
    plain = encode(pipe, "a teddy and a teddy")
    got = encode(pipe, "a <thing:0> and a <off>")
    assert same(got, plain) and not hook.rows_of(got[0])
    hook.enabled = False
    got = encode(pipe, "a <thing> and a <thing:2>")
    assert same(got, plain) and not hook.rows_of(got[0])


def test_gradients_flow_to_the_embeddings(pipe, hooked):
    words = [weight.clone().requires_grad_() for weight in embeddings_of(pipe, "cat")]
    hooked(pipe, thing=LoadedConcept("teddy", words))
    got = encode(pipe, "a <thing>", guidance=True)
    got[0].square().sum().backward()
    assert all(word.grad.abs().sum() > 0 for word in words)
    assert not got[1].requires_grad


def test_encodings_of_a_word_in_training_are_remembered_without_gradients_only(sd, hooked):
    hook = hooked(sd, thing=LoadedConcept("teddy", [embeddings_of(sd, "cat")[0].clone().requires_grad_()]))
    assert not hook.rows_of(encode(sd, "a <thing>")[0])
    with torch.no_grad():
        assert names(hook.rows_of(encode(sd, "a <thing>")[0])) == {0: ["thing"]}


def test_a_textual_inversion_is_left_alone(hooked):
    pipe = tiny_sd(seed=3)
    pipe.tokenizer.add_tokens(["<sks>", "<sks>_1"])  # one of two vectors
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    plain = encode(pipe, "a <sks> on a cat by <sks>")
    hooked(pipe, thing=cat(pipe))
    assert same(encode(pipe, "a <sks> on a <thing> by <sks>"), plain)
    assert same(encode(pipe, "a <sks> on a cat by <sks>"), plain)


# Refusals


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a <bear>", "no concept <bear> is loaded; loaded are: <thing>"),
        ("a " * 75 + "<thing>", "<thing> lies beyond the 77 tokens"),
        ("a " * 200 + "<thing>", "<thing> lies beyond the 77 tokens"),
        ("it'<thing>", "<thing> must stand as a word of its own"),
        ("<thing|bias=0.5> and <thing>", "<thing> is named twice in one prompt with different settings"),
    ],
)
def test_prompts_that_cannot_be_encoded(sd, hooked, prompt, message):
    hooked(sd, thing=cat(sd))
    plain = encode(sd, "a teddy")
    with pytest.raises(PromptError, match=message):
        encode(sd, prompt)
    assert same(encode(sd, "a teddy"), plain)


def test_a_call_that_fails_halfway_leaves_nothing_to_be_put_in_place(sd, hooked):
    hooked(sd, thing=cat(sd))
    plain = encode(sd, "a teddy")
    with pytest.raises(TypeError, match="same type"):  # after the prompt is encoded, before the negative one
        encode(sd, ["a dog"], guidance=True, negative_prompt="a <thing>")
    assert same(encode(sd, "a teddy"), plain)


def test_clip_skip_is_refused_with_concepts_only(pipes, hooked):
    pipe = pipes["sdxl"]  # diffusers' SD pipeline and transformers 5 do not agree about clip_skip
    hooked(pipe, thing=cat(pipe))
    encode(pipe, "a cat", clip_skip=1)
    with pytest.raises(PromptError, match="clip_skip does not work with concepts"):
        encode(pipe, "a <thing>", clip_skip=1)


def test_an_encoder_that_the_hook_does_not_know_is_noticed(hooked):
    pipe = tiny_sd(seed=3)
    hooked(pipe, thing=cat(pipe))
    pipe.text_encoder = tiny_sd(seed=4).text_encoder
    with pytest.raises(PromptError, match="could not be put in place"):
        encode(pipe, "a <thing>")


def test_a_second_negative_prompt_that_is_never_encoded_is_noticed(pipes, hooked):
    pipe = pipes["sdxl"]
    assert pipe.config.force_zeros_for_empty_prompt
    hooked(pipe, thing=cat(pipe))
    with pytest.raises(PromptError, match="could not be put in place"):
        encode(pipe, "a cat", guidance=True, negative_prompt_2="a <thing>")


def test_a_pipeline_without_encode_prompt_is_refused(sd):
    class Old:
        tokenizer, text_encoder = sd.tokenizer, sd.text_encoder

    with pytest.raises(UnsupportedPipeline, match="Old is not supported: it has no encode_prompt"):
        TextHook(Old(), {})


@pytest.mark.parametrize(("word", "message"), [("", "holds nothing that"), ("zyx " * 9, "27 tokens long; at most 16 are read as one")])
def test_a_superclass_that_cannot_be_read(sd, word, message):
    with pytest.raises(ValueError, match=message):
        superclass_tokens(sd.tokenizer, word)


def test_a_word_that_the_model_hardly_knows_is_warned_about():
    """toybox has no word for dogs. Suggested superclasses are words of the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TOYBOX / "tokenizer")
    with pytest.warns(UserWarning, match="superclass 'zebra' becomes 5 tokens .* A word that it knows .* such as '") as warned:
        warn_of_unknown_word(tokenizer, "zebra")
    suggested = re.findall("'([a-z]+)'", str(warned[0].message).split("such as")[1])
    assert len(suggested) == 3 and all(len(superclass_tokens(tokenizer, word)) == 1 for word in suggested)


# Install and remove


def test_remove_leaves_no_trace(pipe):
    encode(pipe, "a cat")  # transformers sets hooks of its own at the first call
    method, hooks = pipe.encode_prompt, [hooks_of(encoder) for _, encoder in pairs(pipe)]
    hook = TextHook(pipe, {"thing": cat(pipe)})
    hook.install()
    assert [hooks_of(encoder) for _, encoder in pairs(pipe)] != hooks
    hook.remove()
    assert "encode_prompt" not in vars(pipe) and pipe.encode_prompt == method
    assert [hooks_of(encoder) for _, encoder in pairs(pipe)] == hooks


def test_remove_without_install(pipe):
    TextHook(pipe, {}).remove()
    assert "encode_prompt" not in vars(pipe)


def test_remove_gives_back_a_method_that_the_pipeline_had_of_its_own():
    pipe = tiny_sd(seed=3)
    calls = []

    def encode_prompt(*args, own=type(pipe).encode_prompt, **kwargs):
        calls.append(args)
        return own(pipe, *args, **kwargs)

    pipe.encode_prompt = encode_prompt
    hook = TextHook(pipe, {"thing": cat(pipe)})
    hook.install()
    pipe.encode_prompt("a <thing>", "cpu", 1, False)
    hook.remove()
    assert pipe.encode_prompt is encode_prompt and calls


def test_a_wrapper_around_the_wrapper_still_works_after_remove():
    pipe = tiny_sd(seed=3)
    plain = encode(pipe, "a teddy")
    hook = TextHook(pipe, {"thing": cat(pipe)})
    hook.install()
    inner = pipe.encode_prompt
    pipe.encode_prompt = outer = lambda *args, **kwargs: inner(*args, **kwargs)
    hook.remove()
    assert pipe.encode_prompt is outer and same(encode(pipe, "a teddy"), plain)


# Known again


def edit(name="thing", **settings):
    return RowRequest((Mention(name, "", **settings),))


def row(seed, dtype=torch.float32):
    return torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_known_by_content_in_any_batch_and_after_casts(dtype):
    known, first, second = EncodingRegistry(), edit("first"), edit("second")
    known.remember([(torch.cat([row(1, dtype), row(2, dtype), row(3, dtype)]), [first, None, second])])
    batch = torch.cat([row(9, dtype), row(3, dtype), row(2, dtype), row(1, dtype), row(3, dtype)])
    assert known.find(batch) == {1: second, 3: first, 4: second}
    for cast in (torch.float32, torch.float16, torch.bfloat16):
        assert known.find(batch.to(cast)) == known.find(batch.to(cast).to(dtype)) == {1: second, 3: first, 4: second}
    assert known.find(batch.mT.contiguous().mT) == {1: second, 3: first, 4: second}
    assert known.find(torch.cat([row(8), row(9)])) == {}


def test_rows_of_equal_content_keep_their_order():
    known, first, second = EncodingRegistry(), edit(bias=0.1), edit(bias=0.2)
    twice = torch.cat([row(1), row(1)])
    known.remember([(row(5), [None]), (twice, [first, second])])
    assert known.find(twice) == {0: first, 1: second}
    assert known.find(torch.cat([row(5), row(5), twice])) == {2: first, 3: second}
    assert known.find(torch.cat([twice, twice])) == {0: first, 1: second, 2: first, 3: second}  # perturbed attention


def test_content_that_comes_without_a_concept_later_is_plain():
    known = EncodingRegistry()
    known.remember([(row(1), [edit()])])
    known.remember([(row(1), [None])])
    assert not known and known.find(row(1)) == {}


def test_an_earlier_tensor_brings_its_own_settings_back():
    known, first, second = EncodingRegistry(), edit(bias=0.1), edit(bias=0.2)
    early, late = row(1), row(1)
    known.remember([(early, [first])])
    known.remember([(late, [second])])
    assert known.find(row(1)) == {0: second}
    known.recall(early)
    assert known.find(row(1)) == {0: first}
    known.recall(None)
    known.recall(row(1))  # another object: nothing is known of it
    assert known.find(row(1)) == {0: first}


def test_forget():
    known = EncodingRegistry()
    both, other = torch.cat([row(1), row(2)]), row(3)
    known.remember([(both, [RowRequest((Mention("a", ""), Mention("b", ""))), edit("b")])])
    known.remember([(other, [edit("c")])])
    known.forget("a")
    assert names(known.find(torch.cat([both, other]))) == {1: ["b"], 2: ["c"]}
    known.forget("b")
    known.recall(both)
    assert names(known.find(torch.cat([both, other]))) == {2: ["c"]}


def test_memory_is_bounded_and_the_oldest_goes_first(monkeypatch):
    monkeypatch.setattr(rows_module, "REMEMBERED", 2)
    known = EncodingRegistry()
    for seed in range(5):
        known.remember([(row(seed), [edit()])])
        known.find(row(0))
    assert [seed for seed in range(5) if known.find(row(seed))] == [3, 4]


def test_a_word_that_is_still_its_superclass_edits_no_plain_prompt(sd, hooked):
    """Before training the concept's embedding is the superclass's: the two prompts encode alike, the later one counts."""
    hook = hooked(sd, thing=LoadedConcept("teddy", embeddings_of(sd, "teddy")))
    both = encode(sd, ["a <thing>", "a teddy"])[0]
    assert torch.equal(both[0], both[1]) and list(hook.rows_of(both)) == [0]
    assert list(hook.rows_of(encode(sd, "a teddy")[0])) == []
    assert list(hook.rows_of(encode(sd, "a <thing>")[0])) == [0]


def test_the_global_lock_remembers_the_superclass_prompt(pipe, hooked):
    hook = hooked(pipe, thing=cat(pipe, key_lock="global"), pot=cat(pipe, "teapot"))
    got = encode(pipe, ["a <thing>", "a <pot>", "a <pot> on a <thing>"], guidance=True)
    plain = encode(pipe, ["a teddy", "a teapot", "a teapot on a teddy"])[0]
    found = hook.rows_of(torch.cat([got[1], got[0]]))
    assert torch.equal(found[3].key_encoding, plain[0]) and found[4].key_encoding is None and torch.equal(found[5].key_encoding, plain[2])
