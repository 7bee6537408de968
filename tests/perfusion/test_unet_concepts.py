"""perfusion.unet_concepts: a UNet, encodings and requests, and no pipeline anywhere."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from perfusion.base import UnsupportedPipeline, cross_attention_layers, describe_base
from perfusion.exporting.graphs import UNetGraph
from perfusion.unet_concepts import Mention, RowRequest, UNetConcepts
from tests.kernels.tolerance import as_run, assert_close, assert_same_run, exactly
from tests.perfusion.editing import make_concept, use, written_out
from tests.perfusion.tiny import tiny_sd

T = 9


@pytest.fixture(scope="module")
def parts():
    """A UNet that nobody else uses, three concepts for it, and the same UNet with K and V as inputs."""
    pipe = tiny_sd()
    base = describe_base(pipe)
    concepts = {
        name: make_concept(base, name, seed=seed, unlocked=name == "mug") for seed, name in enumerate(("teddy", "teapot", "mug"), 1)
    }
    graph = UNetGraph(copy.deepcopy(pipe.unet))
    graph.install()
    return pipe.unet, concepts, graph


@pytest.fixture
def attached(parts):
    unet, concepts, _ = parts
    before = unet.attn_processors
    with UNetConcepts(unet) as mine:
        for concept in concepts.values():
            mine.load(concept)
        yield mine
    assert all(unet.attn_processors[name] is each for name, each in before.items())
    assert not unet._forward_hooks and not unet._forward_pre_hooks


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SEVERAL = [None, (Mention("teddy", strength=0.8),), (Mention("teapot", bias=0.2, temperature=0.3), Mention("mug")), None]


def step(unet, latents, timestep, encodings):
    with torch.no_grad():
        return unet(latents, timestep, encoder_hidden_states=encodings).sample


@pytest.mark.numeric
def test_keys_and_values_are_the_papers(attached, parts):
    unet, concepts, _ = parts
    encodings = numbers(4, T, 16)
    attached.request(encodings, SEVERAL)
    found = attached.keys_values(encodings)
    for row, mentions in enumerate(SEVERAL):
        uses = [use(concepts[each.name], each.strength or 1.0, each.bias, each.temperature) for each in mentions or ()]
        for name, layer in cross_attention_layers(unet).items():
            columns = concepts["teddy"].base.slices[name]
            for kind, table in zip(("key", "value"), found):
                weight = getattr(layer, f"to_{kind[0]}").weight.double()
                outputs = [each.concept.value_output(name) if kind == "value" else each.concept.key_output(name) for each in uses]
                outputs = [
                    weight @ each.concept.superclass_encoding.double() if output is None else output for each, output in zip(uses, outputs)
                ]
                (exact,) = exactly(lambda: written_out(encodings[row], weight, uses, outputs) if uses else encodings[row].double() @ weight.T)
                assert_close(table[row, :, columns], exact, f"{name} {kind}")


@pytest.mark.numeric
def test_a_step_is_that_of_the_exported_unet(attached, parts):
    """Mixed rows, a setting that follows the steps, gates by word: the UNet edits by itself, the other one is given K and V."""
    unet, _, graph = parts
    encodings, latents = numbers(4, T, 16), numbers(4, 4, 8, 8, seed=1)
    scheduled = RowRequest((Mention("teddy", bias=[0.1, 0.6]), Mention("teapot")), places=((2,), (5,)), gate="word")
    attached.request(encodings, [None, scheduled, SEVERAL[1], SEVERAL[2]])
    results = []
    for number, timestep in enumerate((900, 500)):
        mine = step(unet, latents, timestep, encodings)
        assert "the edit of the step" in attached.explain()[0].lower()
        with torch.no_grad():
            theirs = graph(latents, torch.full((4,), float(timestep)), *attached.keys_values(encodings, number))
        assert_same_run(theirs, as_run(lambda: step(unet, latents, timestep, encodings)))
        results.append(mine)
    attached.request(encodings, [None] * 4)
    plain = as_run(lambda: step(unet, latents, 900, encodings))
    assert_same_run(results[0][0], plain[0])
    assert (plain.value - results[0]).abs().amax((1, 2, 3))[1:].min() > 1e-3


def test_without_a_request_the_unet_is_its_own(attached, parts):
    unet, _, graph = parts
    encodings, latents = numbers(2, T, 16), numbers(2, 4, 8, 8, seed=1)
    stock = copy.deepcopy(graph.unet)
    stock.set_attn_processor(AttnProcessor2_0())
    torch.testing.assert_close(step(unet, latents, 500, encodings), step(stock, latents, 500, encodings), rtol=0, atol=0)


def test_keys_and_values_follow_the_weights(attached, parts):
    """Slots and stacked weights are of the weights of now."""
    unet, _, _ = parts
    encodings = numbers(1, T, 16)
    attached.request(encodings, [SEVERAL[1]])
    before = attached.keys_values(encodings)[0]
    step(unet, numbers(1, 4, 8, 8), 500, encodings)
    weight = next(iter(cross_attention_layers(unet).values())).to_k.weight
    with torch.no_grad():
        weight.mul_(2)
        after = attached.keys_values(encodings)[0]
        weight.div_(2)
    assert (after - before).abs().max() > 0.1
    assert torch.equal(attached.keys_values(encodings)[0], before)


@pytest.mark.numeric
def test_unloading_ends_the_edit(attached, parts):
    encodings = numbers(1, T, 16)
    plain = attached.keys_values(encodings)[1]
    attached.request(encodings, [SEVERAL[1]])
    assert not torch.equal(attached.keys_values(encodings)[1], plain)
    attached.unload("teddy")
    weights = torch.cat([layer.to_v.weight for layer in cross_attention_layers(parts[0]).values()]).detach().double()
    assert_close(attached.keys_values(encodings)[1], *exactly(lambda: encodings.double() @ weights.T))


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([None], r"encodings must be \[R, T, 16\] with one request for each of R rows, got \[2, 9, 16\] and 1 requests"),
        ([None, (Mention("dog"),)], "no concept named 'dog' is loaded; loaded are: mug, teapot, teddy"),
        ([None, (Mention("teddy", bias=9),)], "row 1, 'teddy': bias must be a number between -2 and 2"),
        ([None, RowRequest((Mention("teddy"),), places=((9,),))], "row 1: places must lie within the 9 positions"),
        ([None, RowRequest((Mention("teddy"),), key_encoding=torch.zeros(2, 16))], r"row 1: key_encoding must be \[9, 16\], got \[2, 16\]"),
    ],
)
def test_requests_are_checked(rows, match, attached):
    with pytest.raises(ValueError, match=match):
        attached.request(numbers(2, T, 16), rows)


def test_what_is_refused(parts):
    unet, concepts, _ = parts
    with pytest.raises(UnsupportedPipeline, match="it has no cross-attention layer"):
        UNetConcepts(torch.nn.Linear(2, 2))
    foreign = make_concept(describe_base(tiny_sd(width=24)), "teddy")
    with UNetConcepts(unet) as mine, pytest.raises(ValueError, match="cannot be used with this UNet: made for a custom model"):
        mine.load(foreign)
    with pytest.raises(RuntimeError, match="detached from their UNet"):
        mine.load(concepts["teddy"])
