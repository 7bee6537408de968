"""perfusion.handle: attach and detach, and what is done with concepts in between."""

import contextlib
import dataclasses
import warnings

import pytest
import torch

from perfusion.base import UnsupportedPipeline, describe_base
from perfusion.client_concepts import HeldConcepts
from perfusion.concept_file import ConceptFileError
from perfusion.handle import attach, detach
from perfusion.prompts import PromptError
from tests.perfusion.editing import check_rows, draw, hooks_of, make_concept, use, watch
from tests.perfusion.tiny import tiny_sd, tiny_sdxl

PROMPT, PLAIN = "a photo of a <teddy> on a beach", "a photo of a teddy on a beach"


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_sd()
    draw(pipe, PLAIN)  # transformers sets hooks of its own at the first call
    return pipe


@pytest.fixture(scope="module")
def teddy(pipe):
    return make_concept(describe_base(pipe), "teddy")


@pytest.fixture(scope="module")
def teapot(pipe):
    return make_concept(describe_base(pipe), "teapot", seed=2)


@pytest.fixture(scope="module")
def plain(pipe):
    return draw(pipe, PLAIN)


@pytest.fixture
def handle(pipe, teddy):
    with attach(pipe) as handle:
        handle.load(teddy)
        yield handle


def state(pipe):
    """Everything of a pipeline that attach could touch. Kept alive, so that identity means something."""
    modules = [module for part in pipe.components.values() if isinstance(part, torch.nn.Module) for module in part.modules()]
    return {
        "attributes": dict(vars(pipe)),
        "processors": pipe.unet.attn_processors,
        "hooks": [hooks_of(part) for part in pipe.components.values() if isinstance(part, torch.nn.Module)],
        "forwards": [module.__dict__.get("forward") for module in modules],
        "weights": list(pipe.unet.state_dict()),
        "vocabulary": len(pipe.tokenizer),
    }


def assert_restored(pipe, before):
    after = state(pipe)
    assert after["attributes"].keys() == before["attributes"].keys()
    assert all(after["attributes"][key] is value for key, value in before["attributes"].items())
    assert all(after["processors"][key] is value for key, value in before["processors"].items())
    for key in ("hooks", "forwards", "weights", "vocabulary"):
        assert after[key] == before[key], key
    assert pipe.encode_prompt == type(pipe).encode_prompt.__get__(pipe)


# Attach and detach


def test_attach_and_detach_leave_no_trace(pipe, teddy, plain):
    before = state(pipe)
    handle = attach(pipe)
    handle.load(teddy)
    assert not torch.equal(draw(pipe, PROMPT), plain)
    assert torch.equal(draw(pipe, PLAIN), plain)
    assert list(pipe.unet.state_dict()) == before["weights"]
    detach(pipe)
    assert_restored(pipe, before)
    assert torch.equal(draw(pipe, PLAIN), plain)


@pytest.mark.parametrize("where", ["in the block", "while drawing"])
def test_an_exception_leaves_no_trace(pipe, teddy, plain, where):
    before = state(pipe)

    def stop(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), attach(pipe) as handle:
        handle.load(teddy)
        draw(pipe, PROMPT, callback_on_step_end=stop if where == "while drawing" else None)
        stop()
    assert_restored(pipe, before)
    assert torch.equal(draw(pipe, PLAIN), plain)


def test_an_exception_while_drawing_changes_no_later_image(handle, pipe, plain):
    expected = draw(pipe, PROMPT)

    def stop(*_):
        raise ZeroDivisionError

    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    broken = layer.to_q.register_forward_pre_hook(stop)
    with pytest.raises(ZeroDivisionError):
        draw(pipe, PROMPT)
    broken.remove()
    assert torch.equal(draw(pipe, PLAIN), plain) and torch.equal(draw(pipe, PROMPT), expected)


def test_a_second_attach_is_refused(handle, pipe):
    with pytest.raises(RuntimeError, match="already attached"):
        attach(pipe)
    assert "<teddy>" in repr(handle)


def test_a_detached_handle_says_so(pipe, teddy):
    with pytest.raises(RuntimeError, match="not attached"):
        detach(pipe)
    with attach(pipe) as handle:
        handle.load(teddy)
        handle.detach()  # the block's end does not mind
    with_concepts = (lambda: handle.load(teddy), lambda: handle.unload("teddy"), lambda: handle.set("teddy", bias=0))
    for call in (handle.detach, handle.disable, handle.enable, *with_concepts):
        with pytest.raises(RuntimeError, match="this handle is detached"):
            call()
    assert "detached" in repr(handle)
    with attach(pipe) as other:
        with pytest.raises(RuntimeError, match="this handle is detached"):
            handle.detach()
        assert other.concepts() == {}


@pytest.mark.parametrize(
    "compile_unet",
    [
        lambda pipe: setattr(pipe, "unet", torch.compile(pipe.unet, backend="eager")),
        lambda pipe: pipe.unet.compile(backend="eager"),
        lambda pipe: pipe.unet.compile_repeated_blocks(backend="eager"),
        lambda pipe: setattr(pipe.unet, "mid_block", torch.compile(pipe.unet.mid_block, backend="eager")),
    ],
)
def test_a_compiled_unet_is_refused_where_hooks_are_needed_in_it(compile_unet):
    pipe = tiny_sd()
    compile_unet(pipe)
    before = state(pipe)
    with pytest.raises(UnsupportedPipeline, match="compiled already.*attach first, compile then"):
        attach(pipe, exact=True)
    assert_restored(pipe, before)


def test_a_pipeline_that_cannot_be_edited_is_left_as_it_was():
    pipe = tiny_sd()
    pipe.unet.fuse_qkv_projections()
    before = state(pipe)
    with pytest.raises(UnsupportedPipeline, match="fused key and value"):
        attach(pipe)
    assert_restored(pipe, before)


# Loading


def test_load_from_a_file_and_under_another_name(pipe, teddy, tmp_path):
    teddy.save(tmp_path / "bear.safetensors", torch.float32)
    with attach(pipe) as handle:
        assert handle.load(teddy) == "teddy"
        assert handle.load(tmp_path / "bear.safetensors", name="bear") == "bear"
        assert list(handle.concepts()) == ["teddy", "bear"]
        assert torch.equal(draw(pipe, PROMPT), draw(pipe, PROMPT.replace("teddy", "bear")))


def other_base(seed=9, **options):
    return describe_base(tiny_sd(seed=seed, **options))


def test_failed_loads_change_nothing(pipe, teddy, plain, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no concept")
    sdxl, twin = describe_base(tiny_sdxl()), other_base()
    failures = [
        (dict(concept=make_concept(sdxl, "xl")), r"concept 'xl' cannot .*made for .*\(text width 16 \+ 24.*but this is .*\(text width 16,"),
        (dict(concept=make_concept(twin, "twin")), "the text encoder's weights are not the ones"),
        (dict(concept=teddy), "a concept <teddy> is loaded already\\. Unload it"),
        (dict(concept=teddy, name="Teddy!"), "name must be 1 to 32 characters"),
        (dict(concept=dataclasses.replace(teddy, superclass="zyx" * 6), name="a"), "tokens long; at most 16 are read as one"),
        (dict(concept=tmp_path / "broken.safetensors"), "broken"),
        (dict(concept=tmp_path / "missing.safetensors"), "missing"),
        (dict(concept=teddy, name="third"), "all 2 slots are in use"),
    ]
    with attach(pipe, capacity=2) as handle:
        handle.load(teddy)
        handle.load(make_concept(handle.base, "dog", seed=4))
        before, expected = handle.concepts(), draw(pipe, PROMPT)
        for arguments, message in failures:
            with pytest.raises((ValueError, ConceptFileError, OSError), match=message):
                handle.load(**arguments)
            assert handle.concepts() == before
        assert torch.equal(draw(pipe, PROMPT), expected) and torch.equal(draw(pipe, PLAIN), plain)
        handle.unload("dog")
        assert handle.load(teddy, name="third") == "third"


def test_a_name_that_the_tokenizer_has_is_refused(teddy):
    pipe = tiny_sd()
    pipe.tokenizer.add_tokens(["<Teddy>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    with attach(pipe) as handle:
        with pytest.raises(ValueError, match="a word <teddy> of its own .*another name="):
            handle.load(teddy)
        handle.load(teddy, name="bear")
        draw(pipe, "a <teddy> and a <bear>")


def test_concepts_over_different_covariances_are_reported(pipe, teddy):
    def over(covariance):
        return dataclasses.replace(teddy, covariance=covariance)

    with attach(pipe) as handle, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, covariance in {"one": "x", "unknown": "", "same": "x", "other": "y"}.items():
            handle.load(over(covariance), name)
        messages = [str(warning.message) for warning in caught if "covariance" in str(warning.message)]
    assert len(messages) == 1 and messages[0].startswith("<other> was learned with another covariance than <one>, <same>:")
    assert caught[0].filename == __file__


def test_unload_forgets_encodings_and_frees_the_place(pipe, teddy, teapot, plain):
    with attach(pipe, capacity=1) as handle:
        handle.load(teddy)
        embeds = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
        edited = draw(pipe, prompt_embeds=embeds, guidance_scale=1.0)
        handle.unload("teddy")
        with pytest.raises(PromptError, match="no concept <teddy> is loaded; loaded are: none"):
            draw(pipe, PROMPT)
        handle.load(teapot, name="teddy")  # another concept of that name: the old encodings are not its own
        unedited = draw(pipe, prompt_embeds=embeds, guidance_scale=1.0)
        assert not torch.equal(edited, unedited)
        handle.unload("teddy")
        for call in (lambda: handle.unload("teddy"), lambda: handle.set("teddy", bias=0.1)):
            with pytest.raises(ValueError, match="no concept named 'teddy' is loaded; loaded are: none"):
                call()
        assert torch.equal(draw(pipe, prompt_embeds=embeds, guidance_scale=1.0), unedited)


# Settings


def seen(pipe, prompt=None, **options):
    with watch(pipe.unet) as forwards:
        draw(pipe, prompt, **options)
    return forwards


@pytest.mark.numeric
def test_prompt_settings_go_before_those_of_set(handle, pipe, teddy):
    check_rows(pipe.unet, seen(pipe, PROMPT)[0], [[], [use(teddy)]])
    handle.set("teddy", bias=-0.1, temperature=0.8, strength=0.5)
    check_rows(pipe.unet, seen(pipe, PROMPT)[0], [[], [use(teddy, 0.5, -0.1, 0.8)]])
    check_rows(pipe.unet, seen(pipe, "a <teddy|temperature=0.2>")[0], [[], [use(teddy, 0.5, -0.1, 0.2)]])
    check_rows(pipe.unet, seen(pipe, "a <teddy:2|bias=1>")[0], [[], [use(teddy, 2.0, 1.0, 0.8)]])
    settings = handle.concepts()["teddy"]
    assert (settings.strength, settings.bias, settings.temperature, settings.key_lock) == (0.5, -0.1, 0.8, "local")
    settings.bias = 2.0
    assert handle.concepts()["teddy"].bias == -0.1


@pytest.mark.numeric
def test_bias_and_temperature_act_on_what_is_encoded_and_strength_does_not(handle, pipe, teddy):
    embeds = pipe.encode_prompt(["a <teddy>", "a <teddy|bias=0.9>"], "cpu", 1, False)[0]
    handle.set("teddy", bias=0.0, temperature=1.0, strength=0.3)
    forwards = seen(pipe, prompt_embeds=embeds, guidance_scale=1.0)
    check_rows(pipe.unet, forwards[0], [[use(teddy, 1.0, 0.0, 1.0)], [use(teddy, 1.0, 0.9, 1.0)]])


@pytest.mark.numeric
def test_settings_may_change_between_two_steps(handle, pipe, teddy):
    def step(pipe, number, timestep, tensors):
        handle.set("teddy", bias=0.1 * number)
        return {}

    forwards = seen(pipe, PROMPT, callback_on_step_end=step, num_inference_steps=3)
    for forward, bias in zip(forwards, (None, 0.0, 0.1), strict=True):
        check_rows(pipe.unet, forward, [[], [use(teddy, bias=bias)]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(bias=0.1, strength=5), "<teddy>: strength must be a number between 0 and 4, got 5"),
        (dict(bias=0.1, temperature=0), "<teddy>: temperature must be"),
        (dict(strength=1, bias="0.1"), "<teddy>: bias must be a number"),
        (dict(bias=0.1, key_lock="globe"), '<teddy>: key_lock must be "local" or "global", got \'globe\''),
    ],
)
def test_settings_out_of_range_change_nothing(handle, settings, message):
    before = handle.concepts()
    with pytest.raises(ValueError, match=message):
        handle.set("teddy", **settings)
    assert handle.concepts() == before


def test_strength_zero_and_disable_are_the_plain_superclass(handle, pipe, plain):
    edited = draw(pipe, PROMPT)
    assert torch.equal(draw(pipe, PROMPT.replace("teddy", "teddy:0")), plain)
    handle.set("teddy", strength=0)
    assert torch.equal(draw(pipe, PROMPT), plain)
    handle.set("teddy", strength=1)
    handle.disable()
    assert not handle.enabled and torch.equal(draw(pipe, PROMPT), plain)
    handle.enable()
    assert handle.enabled and torch.equal(draw(pipe, PROMPT), edited)


@pytest.mark.numeric
def test_the_global_lock_takes_keys_from_the_superclass_prompt(handle, pipe, teddy, teapot):
    handle.load(teapot)
    handle.set("teddy", key_lock="global")
    prompts = [PROMPT, "a <teapot>", "a <teapot> on a <teddy>"]
    plain = pipe.encode_prompt([PLAIN, "a teapot", "a teapot on a teddy"], "cpu", 1, False)[0]
    rows = [[], [], [], [use(teddy)], [use(teapot)], [use(teapot), use(teddy)]]
    check_rows(pipe.unet, seen(pipe, prompts)[0], rows, keys={3: plain[0], 5: plain[2]})
    handle.set("teddy", key_lock="local")
    check_rows(pipe.unet, seen(pipe, prompts)[0], rows)


# Several concepts


def test_concepts_that_are_copies_cannot_share_a_prompt(handle, pipe, teddy, plain):
    handle.load(teddy, name="bear")
    expected = draw(pipe, PROMPT)
    with pytest.raises(ValueError, match="'teddy', 'bear' cannot share a prompt: they are copies"):
        draw(pipe, "a <teddy> and a <bear>")
    assert torch.equal(draw(pipe, PROMPT), expected) and torch.equal(draw(pipe, PLAIN), plain)
    draw(pipe, ["a <teddy>", "a <bear>"])


@pytest.mark.numeric
def test_many_concepts_in_many_rows(pipe, teddy):
    names = ["teddy", "teapot", "cat", "dog", "tortoise"]
    with attach(pipe) as handle:
        concepts = {name: make_concept(handle.base, name, seed=seed, unlocked=name == "dog") for seed, name in enumerate(names)}
        for name in reversed(names):
            handle.load(concepts[name])
        prompts = ["a <dog> and a <cat>", "a bird", "<tortoise:0.5|bias=0>, <teapot> and a <teddy>, <teapot>", "a <dog|temperature=1>"]
        rows = [
            [use(concepts["dog"]), use(concepts["cat"])],
            [],
            [use(concepts["tortoise"], 0.5, 0.0), use(concepts["teapot"]), use(concepts["teddy"])],
            [use(concepts["dog"], temperature=1.0)],
        ]
        for forward in seen(pipe, prompts, num_images_per_prompt=2):
            check_rows(pipe.unet, forward, [[]] * 8 + [row for row in rows for _ in range(2)])


def test_the_tables_hold_only_what_the_prompt_uses(handle, pipe, teapot, monkeypatch):
    handle.load(teapot)
    sizes, own = [], HeldConcepts.tables
    monkeypatch.setattr(HeldConcepts, "tables", lambda self, device: sizes.append(len(own(self, device).targets)) or own(self, device))
    draw(pipe, PROMPT)
    assert sizes == [1]


def test_concepts_in_a_context_that_is_not_ours(handle, pipe, plain):
    """inference_mode and autograd around the call change nothing."""
    expected = draw(pipe, PROMPT)
    for mode in (torch.inference_mode(), contextlib.nullcontext()):
        with mode:
            assert torch.equal(draw(pipe, PROMPT), expected) and torch.equal(draw(pipe, PLAIN), plain)
