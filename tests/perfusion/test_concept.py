"""perfusion.concept: what a concept computes, and what it may be."""

import dataclasses

import pytest
import torch

from perfusion.base import describe_base
from tests.kernels.tolerance import assert_close, exactly
from tests.perfusion.concepts import TENSORS, make
from tests.perfusion.tiny import tiny_sd


@pytest.fixture(scope="module")
def small():
    return describe_base(tiny_sd())


@pytest.mark.numeric
def test_concept_computes_the_gate(small):
    concept = make(small)
    assert concept.metric_target.abs().max() == 1
    beside = (0.7 * concept.target + sign * concept.superclass_encoding for sign in (1, -1))
    along = torch.stack([concept.target, *beside])
    encodings, target, metric_target = (x.double() for x in (along, concept.target, concept.metric_target))

    def similarity():
        return encodings @ metric_target / (target @ metric_target)

    (exact,) = exactly(similarity)
    assert_close(torch.ones(()).double(), exact[0])
    assert_close(concept.similarity(along), exact)
    assert_close(concept.gate(along), *exactly(lambda: torch.sigmoid((similarity() - 0.70) / 0.15)))
    assert_close(concept.gate(along, 0.5, 0.1), *exactly(lambda: torch.sigmoid((similarity() - 0.5) / 0.1)))


def test_concept_splits_outputs_by_layer(small):
    concept = make(small, keys=True)
    parts = [concept.value_output(name) for name in small.layers]
    assert [len(part) for part in parts] == list(small.layers.values())
    assert torch.equal(torch.cat(parts), concept.value_outputs)
    assert torch.equal(torch.cat([concept.key_output(name) for name in small.layers]), concept.key_outputs)
    assert make(small).key_output(next(iter(small.layers))) is None
    with pytest.raises(KeyError, match="has no layer 'attn9'; its layers are down_blocks"):
        concept.value_output("attn9")


def test_concept_moves_and_prints(small):
    concept = make(small, keys=True)
    half = concept.to(dtype=torch.bfloat16)
    assert {getattr(half, field).dtype for field in TENSORS} | {half.word_embeddings[0].dtype} == {torch.bfloat16}
    assert half.metric_target.abs().max() == 1 and half.name == concept.name and half.created == concept.created
    assert concept.to("cpu").target.dtype == torch.float32
    text = "Concept('my-teddy', superclass='teddy', base=custom, layers=4, outputs=40, bias=0.7, temperature=0.15)"
    assert repr(make(small)) == text
    assert repr(concept).endswith("keys not locked)")


def test_concept_is_detached_and_frozen(small):
    concept = make(small, target=torch.ones(16, requires_grad=True), metric_target=torch.ones(16, requires_grad=True))
    assert not concept.target.requires_grad and not concept.metric_target.requires_grad
    with pytest.raises(dataclasses.FrozenInstanceError):
        concept.bias = 0.5


@pytest.mark.parametrize("name", ["", "-a", "_a", "Teddy", "a b", "a" * 33, "é", "a\n", "<a>", "../a", None, 3])
def test_bad_names_are_refused_with_the_rule(small, name):
    with pytest.raises(ValueError, match="name must be 1 to 32 characters of a-z, 0-9, '-' and '_', the first a letter or digit"):
        make(small, name=name)


@pytest.mark.parametrize("name", ["a", "0", "my-teddy_2", "n" * 32])
def test_good_names_pass(small, name):
    assert make(small, name=name).name == name


NAN = torch.full((16,), float("nan"))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(superclass=""), "superclass must not be empty"),
        (dict(superclass="a\nb"), "superclass must be printable text on one line"),
        (dict(author="\x1b[31m"), "author must be printable"),
        (dict(license="x" * 65), "license must be at most 64 bytes .*got 65"),
        (dict(author="テ" * 22), "author must be at most 64 bytes .*got 66"),
        (dict(author=" a"), "author must not be empty or begin or end with a space"),
        (dict(covariance="c" * 25), "covariance must be at most 24 bytes"),
        (dict(recipe=[1]), "recipe must map text to"),
        (dict(recipe={1: 2}), "recipe must map text to"),
        (dict(recipe={"a": {"b": 1}}), "recipe must map text to"),
        (dict(recipe={"a": float("nan")}), "recipe must hold finite numbers"),
        (dict(recipe={"a": "\ud800"}), "recipe must hold printable text"),
        (dict(recipe={"a": ["b", "\x1b[2J"]}), "recipe must hold printable text"),
        (dict(recipe={"a\n": 1}), "recipe must hold printable text"),
        (dict(recipe={"a": "x" * 300}), "recipe must be at most 248 bytes as JSON text, got 312"),
        (dict(bias=float("nan")), "bias must be a number from -2 to 2, got nan"),
        (dict(bias=True), "bias must be a number"),
        (dict(temperature=0), "temperature must be a number from 0.001 to 10, got 0"),
        (dict(created="yesterday"), "created must be a UTC time like"),
        (dict(created="2025-13-01T00:00:00Z"), "created must be a UTC time like"),
        (dict(target=torch.ones(15)), r"target must be a floating point tensor of shape \(16,\), got torch.float32 \(15,\)"),
        (dict(target=torch.ones(16, dtype=torch.int64)), "target must be a floating point tensor .*int64"),
        (dict(superclass_encoding=NAN), "superclass_encoding must be finite"),
        (dict(value_outputs=torch.ones(4, 10)), r"value_outputs must be .* shape \(40,\), got torch.float32 \(4, 10\)"),
        (dict(key_outputs=[1.0]), r"key_outputs must be .*got list"),
        (dict(word_embeddings=torch.ones(1, 16)), "word_embeddings must be a tuple of 1, one per text encoder"),
        (dict(word_embeddings=(torch.ones(16), torch.ones(16))), "word_embeddings must be a tuple of 1"),
        (dict(word_embeddings=(torch.ones(3),)), r"word_embeddings\[0\] must be .*\(16,\)"),
        (dict(metric_target=torch.zeros(16)), "metric_target must not be all zero"),
        (dict(target=torch.ones(16), metric_target=-torch.ones(16)), "energy .* must be positive, got -16"),
    ],
)
def test_broken_fields_are_refused_by_name(small, fields, message):
    with pytest.raises(ValueError, match=message):
        make(small, **fields)


def test_a_base_must_be_a_base(small):
    with pytest.raises(ValueError, match="base must be a perfusion.base.Base, got str"):
        dataclasses.replace(make(small), base="sd1")
