"""PixArt: a transformer that projects T5's output, masks its padding, and has biases in its projections. Learned, saved, combined, drawn."""

import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline

from perfusion import Request
from perfusion.base import Base, UnsupportedPipeline, cross_attention_layers, describe_base, project_text
from perfusion.concept import Concept
from perfusion.covariance import compute_covariance
from perfusion.engine import engine_of
from perfusion.families import family_by_id
from perfusion.handle import attach
from perfusion.prompts import PromptError
from perfusion.training.data import read_pictures
from perfusion.training.session import TrainingSession
from tests.kernels.tolerance import as_run, assert_close, assert_same_run, exactly
from tests.perfusion import editing
from tests.perfusion.editing import PLAIN, PROMPTS, check_rows, guided, make_concept, unguided, use
from tests.perfusion.learning import assert_unchanged, covariance_of, learn, settings, snapshot, write_pictures
from tests.perfusion.tiny import tiny_pixart

pytestmark = pytest.mark.models

OPTIONS = dict(use_resolution_binning=False, max_sequence_length=24)  # of 300, which one test has
ENCODING = dict(do_classifier_free_guidance=False, max_sequence_length=24)
KINDS = pytest.mark.parametrize("kind", [PixArtAlphaPipeline, PixArtSigmaPipeline])


def draw(pipe, prompt=None, **options):
    return editing.draw(pipe, prompt, **{**OPTIONS, **options})


def seen(pipe, prompt=None, **options):
    return editing.seen(pipe, prompt, **{**OPTIONS, **options})


@pytest.fixture
def pipe():
    return tiny_pixart()


@pytest.fixture
def teddy(pipe):
    return make_concept(describe_base(pipe), "teddy")


# Drawn


@pytest.mark.numeric
@KINDS
@pytest.mark.parametrize(("exact", "guidance"), [(False, 4.5), (True, 4.5), (False, 1.0)])
def test_every_row_is_edited_as_written_out(kind, exact, guidance):
    pipe = tiny_pixart(kind)
    teddy, plain = make_concept(describe_base(pipe), "teddy"), draw(pipe, PLAIN, guidance_scale=guidance)
    without_concept = as_run(lambda: draw(pipe, PLAIN, guidance_scale=guidance)[1])
    with attach(pipe, exact=exact) as handle:
        handle.load(teddy)
        images, forwards = seen(pipe, PROMPTS, guidance_scale=guidance)
        assert len(forwards) == 2 and all(forward.fast != exact for forward in forwards)
        for forward in forwards:
            check_rows(pipe.transformer, forward, (guided if guidance > 1 else unguided)([use(teddy)]))
        assert not torch.allclose(images[0], plain[0], atol=1e-2)
        assert_same_run(images[1], without_concept)
        assert torch.equal(images[1], plain[1]) or not exact
        assert torch.equal(draw(pipe, ["a photo of a <teddy:0> on a beach", "a cat"], guidance_scale=guidance), plain)
    assert torch.equal(draw(pipe, PLAIN, guidance_scale=guidance), plain)


@pytest.mark.numeric
def test_keys_without_the_lock_and_two_concepts(pipe):
    base = describe_base(pipe)
    teddy, pot = make_concept(base, "teddy", unlocked=True), make_concept(base, "teapot", seed=2)
    for exact in (False, True):
        with attach(pipe, exact=exact) as handle:
            handle.load(teddy)
            handle.load(pot)
            forward = seen(pipe, ["a <teddy> in a <teapot|bias=0.5>", "a cat"])[1][0]
            check_rows(pipe.transformer, forward, guided([use(teddy), use(pot, bias=0.5)]))


@pytest.mark.numeric
def test_the_global_lock_projects_the_superclass_prompt(pipe, teddy):
    plain = project_text(pipe.transformer, pipe.encode_prompt(PLAIN[0], **ENCODING)[0])[0]
    for exact in (False, True):
        with attach(pipe, exact=exact) as handle:
            handle.load(teddy)
            handle.set("teddy", key_lock="global")
            check_rows(pipe.transformer, seen(pipe, PROMPTS)[1][0], guided([use(teddy)]), keys={2: plain})


def test_padding_is_not_read(pipe, teddy):
    """What stands behind the text changes nothing, on either path, and what stands in it does."""
    encoded = list(pipe.encode_prompt(PROMPTS[1:], **ENCODING)[:2])
    for exact in (False, True):
        with attach(pipe, exact=exact) as handle:
            handle.load(teddy)
            given = []
            for start in (8, 2):
                encodings = encoded[0].clone()
                encodings[:, start:] += 1
                handle.bind(encodings, "a <teddy> is here")
                mask = encoded[1].clone()
                given.append(draw(pipe, prompt_embeds=encodings, prompt_attention_mask=mask, negative_prompt=None, guidance_scale=1.0))
            handle.bind(encoded[0], "a <teddy> is here")
            untouched = draw(pipe, prompt_embeds=encoded[0], prompt_attention_mask=encoded[1], negative_prompt=None, guidance_scale=1.0)
            assert engine_of(pipe.transformer).form == "slots"
            assert torch.equal(given[0], untouched) and not torch.allclose(given[1], untouched, atol=1e-3)


@pytest.mark.parametrize("mask", [torch.full((2, 24), 0.5), torch.cat([torch.ones(1, 24), torch.zeros(1, 24)])], ids=["half", "nothing"])
def test_a_mask_that_is_none_of_padding_takes_the_hooks(pipe, teddy, mask):
    with attach(pipe) as handle:
        handle.load(teddy)
        encodings = pipe.encode_prompt(PROMPTS, **ENCODING)[0]
        editing.draw(pipe, prompt_embeds=encodings, prompt_attention_mask=mask, negative_prompt=None, guidance_scale=1.0, **OPTIONS)
        assert "text mask of other numbers than 0 and 1" in handle.explain()[0]


def test_regions_and_padding_together(pipe):
    base, left = describe_base(pipe), torch.zeros(8, 8)
    left[:, :4] = 1
    prompts = [Request("a <teddy> by a <teapot>", regions={"teddy": left, "teapot": 1 - left}), "a cat"]
    with attach(pipe) as handle:
        handle.load(make_concept(base, "teddy"))
        handle.load(make_concept(base, "teapot", seed=2))
        plain, regional = draw(pipe, [str(each) for each in prompts]), draw(pipe, prompts)
        assert torch.equal(plain[1], regional[1]) and not torch.allclose(plain[0], regional[0], atol=1e-2)
        state = engine_of(pipe.transformer).state
        places = [int(bits) for bits in state.key_regions[2, :8]]
        assert places == [0, 1, 0, 0, 2, 0, -(2**31), -(2**31)]  # a teddy by a teapot </s>, and padding


@pytest.mark.numeric
def test_prompts_are_read_as_the_pipeline_reads_them(pipe):
    """Small letters, words of several tokens, and no more tokens than the call asks for."""
    base = describe_base(pipe)
    pipe_concepts = {"bear": make_concept(base, "bear", superclass="Teddy Bear"), "pot": make_concept(base, "pot", superclass="armadillo")}
    with attach(pipe) as handle:
        for concept in pipe_concepts.values():
            handle.load(concept)
        text = handle._text
        assert text.read_at(0, "A photo of a <bear>, big") == [5] and text.read_at(0, "<pot>") == [8]
        assert torch.equal(draw(pipe, "A Photo of <bear:0>!"), draw(pipe, "a photo of teddy bear!"))
        with pytest.raises(PromptError, match="lies beyond the 6 tokens"):
            draw(pipe, "a photo of a small old <bear>", max_sequence_length=6)
        forward = seen(pipe, "a <bear>", max_sequence_length=300)[1][0]
        assert forward.encodings.shape[1] == 300
        check_rows(pipe.transformer, forward, [[], [use(pipe_concepts["bear"])]])


def test_gates_by_word(pipe, teddy):
    with attach(pipe) as handle:
        handle.load(teddy)
        usual = draw(pipe, PROMPTS)
        handle.set("teddy", gate="word", bias=0.99)
        by_word = draw(pipe, PROMPTS)
        assert handle._engine.form == "slots" and not torch.allclose(usual[0], by_word[0], atol=1e-2)


@pytest.mark.numeric
def test_weights_of_the_projection_that_change_are_followed(pipe, teddy):
    """The same encodings, given again: what was made of them is made anew."""
    with attach(pipe) as handle:
        handle.load(teddy)
        for exact in (False, True):
            handle.exact = exact
            encodings, mask = pipe.encode_prompt(PROMPTS, **ENCODING)[:2]
            options = dict(prompt_embeds=encodings, prompt_attention_mask=mask, negative_prompt=None, guidance_scale=1.0)
            draw(pipe, **options)
            with torch.no_grad():
                pipe.transformer.caption_projection.linear_1.weight.mul_(1.5)
            check_rows(pipe.transformer, seen(pipe, **options)[1][0], unguided([use(teddy)]))


def test_a_checkpointed_layer_with_gradients_is_refused(pipe, teddy):
    with attach(pipe) as handle:
        handle.load(teddy)
        encodings = pipe.encode_prompt("a <teddy>", **ENCODING)[0].requires_grad_()
        pipe.transformer.enable_gradient_checkpointing()
        added = {"resolution": None, "aspect_ratio": None}
        with pytest.raises(ValueError, match="disable_gradient_checkpointing"):
            pipe.transformer(torch.zeros(1, 4, 8, 8), encoder_hidden_states=encodings, timestep=torch.ones(1), added_cond_kwargs=added)


# Learned


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pixart") / "pictures", mask=True)


CAPTIONS = ("a {}", "a photo of a {}")


def session_on(pipe, folder, **changes):
    config = settings(instance_prompts=CAPTIONS, **changes)
    return TrainingSession(pipe, describe_base(pipe), config, covariance_of(pipe), read_pictures(folder, config, 16))


@KINDS
def test_learned_saved_combined_and_drawn(kind, folder, tmp_path):
    pipe = tiny_pixart(kind)
    before = snapshot(pipe)
    teddy = learn(pipe, folder, name="mine", superclass="teddy bear", output=tmp_path / "out")
    assert_unchanged(pipe, before)
    assert teddy.base == describe_base(pipe) and teddy.target.shape == (16,) and [len(word) for word in teddy.word_embeddings] == [24]
    pot = learn(pipe, folder, name="pot", superclass="teapot", learning_rate=0.1)
    again = Concept.load(tmp_path / "out/mine.safetensors")
    plain = draw(pipe, ["a photo of a teddy bear", "a cat"])
    with attach(pipe) as handle:
        handle.load(again)
        handle.load(pot)
        images = draw(pipe, ["a photo of a <mine>", "a <mine> in a <pot>"])
        assert torch.equal(draw(pipe, ["a photo of a <mine:0>", "a cat"]), plain)
    assert torch.isfinite(images).all() and not torch.allclose(images[0], plain[0], atol=1e-3)


@pytest.mark.numeric
def test_a_start_is_the_superclass_itself(pipe, folder):
    """Before the first step o* = W s without the bias, so that a gate of 1 would change nothing at the word."""
    with session_on(pipe, folder) as session:
        s = session.superclass_encoding
        for name, layer in cross_attention_layers(pipe.transformer).items():
            assert_close(session.value_outputs[session.base.slices[name]], *exactly(torch.mv, layer.to_v.weight.double(), s.double()), name)
        raw = pipe.encode_prompt(["a teddy", "a photo of a teddy"], **ENCODING)[0]
        read = project_text(pipe.transformer, raw)
        assert_close(s, *exactly(lambda: (read[0, 1].double() + read[1, 4].double()) / 2))


@pytest.mark.numeric
@pytest.mark.parametrize("key_lock", [True, False])
@pytest.mark.parametrize("size", [8, 128])
def test_products_of_all_layers_and_calls_of_each_learn_the_same(folder, key_lock, size):
    """size 128: the transformer reads the size of the picture, too."""
    sides = dict(sample_size=size, attention_head_dim=12, cross_attention_dim=24) if size == 128 else {}
    pipe = tiny_pixart(dtype=torch.float64, **sides)

    def learned(one_by_one):
        layer = next(iter(cross_attention_layers(pipe.transformer).values()))
        hook = layer.to_v.register_forward_hook(lambda module, args, output: None) if one_by_one else None
        with session_on(pipe, folder, key_lock=key_lock, gradient_checkpointing=one_by_one) as session:
            assert (session.obstacle is None) != one_by_one
            losses = [torch.tensor(session.train_step().loss) for _ in range(2)]
            gradients = [parameter.grad.clone() for parameter in session._trained().values()]
        if hook is not None:
            hook.remove()
        return *losses, *gradients

    for mine, other in zip(learned(False), as_run(lambda: learned(True)), strict=True):
        assert other.value.abs().sum() > 0
        assert_same_run(mine, other)


@pytest.mark.numeric
def test_covariance_is_of_projected_tokens_without_padding(pipe):
    captions = ["A teddy bear on a beach", "cat", "a photo of a large red teapot, near the sea"]

    def rows():
        for caption in captions:
            ids = pipe.tokenizer(caption.lower(), return_tensors="pt").input_ids
            encoded = pipe.text_encoder(ids, attention_mask=torch.ones_like(ids))[0]  # without padding at all
            yield pipe.transformer.caption_projection(encoded)[0]

    def moment():
        read = torch.cat(list(rows()))
        return read.T @ read / len(read)

    found = compute_covariance(pipe, captions, progress=False, max_condition=1e12)
    assert found.tokens == sum(map(len, rows()))
    assert_same_run(found.matrix.float(), as_run(moment))


# Its family


def test_another_projection_is_another_base(pipe, teddy):
    """α and Σ have one text encoder and two projections."""
    other = tiny_pixart(PixArtAlphaPipeline)
    with torch.no_grad():
        for linear in (other.transformer.caption_projection.linear_1, other.transformer.caption_projection.linear_2):
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(8)))
    with attach(other) as handle, pytest.raises(ValueError, match="text encoder's weights are not the ones"):
        handle.load(teddy)
    same = tiny_pixart(PixArtAlphaPipeline, dtype=torch.bfloat16)
    assert describe_base(pipe).mismatch(describe_base(same)) is None


def test_a_concept_for_the_whole_model_keeps_its_size():
    longest = dict(superclass="s" * 64, license="l" * 64, author="ä" * 32, covariance="c" * 24, recipe={"r": "x" * 236})
    layers = {f"transformer_blocks.{number}.attn2": 1152 for number in range(28)}
    base = Base("pixart", 1152, (4096,), layers, "B" * 43 + "=")
    data = make_concept(base, "n" * 32, **longest).to_bytes()
    assert 79_616 < len(data) <= family_by_id("pixart").file_bytes
    assert Concept.from_bytes(data).base == base


def test_a_transformer_without_a_projection_is_refused():
    pipe = tiny_pixart(caption_channels=None)
    with pytest.raises(UnsupportedPipeline, match="PixArtSigmaPipeline is not supported: its transformer has no caption projection"):
        attach(pipe)
