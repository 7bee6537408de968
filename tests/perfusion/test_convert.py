"""perfusion.convert: what comes out of the two ports' checkpoints."""

import pytest
import torch

from perfusion import convert as module
from perfusion.base import UnsupportedPipeline
from perfusion.convert import ConversionError, convert
from perfusion.convert.gates import Reader
from perfusion.convert.layouts import CHENDARYEN, LUCIDRAINS
from tests.kernels.tolerance import Exact, as_run, assert_close, assert_same_run, exactly
from tests.perfusion.checkpoints import ORIGINAL, WORD_TOKEN, Truth, chendaryen, package, save, state_dict
from tests.perfusion.tiny import tiny_sd, tiny_sdxl


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture
def truth(pipe):
    return Truth(pipe)


def locked(truth, keys):
    """The encoding that all layers' locked keys are of, float64."""
    weights = torch.cat([truth.to_k[name] for name in truth.base.layers]).double()
    return torch.linalg.lstsq(weights, keys[:, None]).solution[:, 0]


def assert_locked(concept, truth):
    keys = torch.cat([truth.keys(name) for name in truth.base.layers]).double()
    assert_close(concept.superclass_encoding, *exactly(lambda: locked(truth, keys)))


def check_common(concept, truth):
    assert torch.equal(concept.target, truth.targets[0])
    assert torch.equal(concept.word_embeddings[0], truth.words[0])
    inverse, target = truth.inverse.double(), truth.targets[0].double()
    largest = (inverse @ target).abs().max()
    assert_close(concept.metric_target, *exactly(lambda: inverse @ target / largest))
    assert concept.base == truth.base and (concept.name, concept.superclass) == ("my-teddy", "teddy")
    assert concept.covariance.startswith("inverse-")


# First port


@pytest.mark.numeric
def test_package_converts_exactly(pipe, truth, tmp_path):
    concept, notes = convert(save(tmp_path, package(truth)), pipe, name="my-teddy", superclass="teddy", author="A", license="CC0-1.0")
    check_common(concept, truth)
    assert torch.equal(concept.value_outputs, truth.value_outputs())
    assert_locked(concept, truth)
    assert concept.key_outputs is None
    assert (concept.author, concept.license, concept.recipe) == ("A", "CC0-1.0", {"source": LUCIDRAINS})
    assert notes[0] == f"Checkpoint of {LUCIDRAINS}."
    assert any(note.startswith("s comes from the locked keys") for note in notes)
    assert not any("Approximated" in note or "Warning" in note for note in notes)
    concept.save(tmp_path / "c.safetensors")


def test_package_of_the_original_code_has_the_middle_block_in_the_middle(pipe, truth, tmp_path):
    order = [name for part in ("down", "mid", "up") for name in truth.base.layers if name.startswith(part)]
    assert order != list(truth.base.layers)
    concept, _ = convert(save(tmp_path, package(truth, order)), pipe, name="my-teddy", superclass="teddy")
    assert torch.equal(concept.value_outputs, truth.value_outputs())
    assert concept.key_outputs is None


def test_package_order_is_decided_by_the_lock_where_widths_agree(tmp_path):
    pipe = tiny_sd(unet=dict(block_out_channels=(8, 8)))
    truth = Truth(pipe)
    order = [name for part in ("down", "mid", "up") for name in truth.base.layers if name.startswith(part)]
    for layers in (order, list(truth.base.layers)):
        concept, _ = convert(save(tmp_path, package(truth, layers)), pipe, name="my-teddy", superclass="teddy")
        assert torch.equal(concept.value_outputs, truth.value_outputs())
    content = package(truth)
    for pair in content["key_value_params"][0::2]:
        pair[1] = truth.draw(*pair[1].shape)
    with pytest.raises(ConversionError, match="order of the layers cannot be told"):
        convert(save(tmp_path, content), pipe, name="my-teddy", superclass="teddy")


@pytest.mark.numeric
def test_unlocked_keys_are_kept(pipe, truth, tmp_path):
    content = package(truth)
    keys = content["key_value_params"][0::2]
    for pair in keys:
        pair[1] = pair[1] + truth.draw(*pair[1].shape)
    concept, notes = convert(save(tmp_path, content), pipe, name="my-teddy", superclass="teddy")
    assert torch.equal(concept.key_outputs, torch.cat([output[0] for _, output in keys]))
    s = Reader(pipe).superclass_encoding("teddy", module.TEMPLATES)
    assert torch.equal(concept.superclass_encoding, s.float())
    assert any("without the key lock" in note for note in notes)
    concept, _ = convert(save(tmp_path, content), pipe, name="my-teddy", superclass="armadillo")  # of several tokens: at the last one
    places = [len(pipe.tokenizer(text.format("armadillo")).input_ids) - 2 for text in module.TEMPLATES]

    def at_the_last_tokens():
        encodings = pipe.encode_prompt([text.format("armadillo") for text in module.TEMPLATES], "cpu", 1, False)[0]
        return encodings[torch.arange(len(places)), places].mean(0)

    with torch.no_grad():
        assert_same_run(concept.superclass_encoding, as_run(at_the_last_tokens))


def test_values_that_were_never_trained_are_reported(pipe, truth, tmp_path):
    truth.moves = {name: torch.zeros_like(move) for name, move in truth.moves.items()}
    _, notes = convert(save(tmp_path, package(truth)), pipe, name="my-teddy", superclass="teddy")
    assert any(note.startswith("Warning: the values are W_V times one encoding") for note in notes)


def test_one_of_several_concepts(pipe, tmp_path):
    truth = Truth(pipe, concepts=3)
    path = save(tmp_path, package(truth, concepts=3))
    with pytest.raises(ConversionError, match="holds 3 concepts. Choose one by index, 0 to 2"):
        convert(path, pipe, name="my-teddy", superclass="teddy")
    with pytest.raises(ConversionError, match="index must be 0 to 2, got 3"):
        convert(path, pipe, name="my-teddy", superclass="teddy", index=3)
    concept, _ = convert(path, pipe, name="my-teddy", superclass="teddy", index=2)
    assert torch.equal(concept.target, truth.targets[2])
    assert torch.equal(concept.word_embeddings[0], truth.words[2])


@pytest.mark.numeric
def test_targets_that_differ_by_layer_are_averaged_or_refused(pipe, truth, tmp_path):
    content = package(truth)
    content["key_value_params"][0][0] *= 1.01
    concept, notes = convert(save(tmp_path, content), pipe, name="my-teddy", superclass="teddy")
    assert_close(concept.target, *exactly(lambda: truth.targets[0].double() * (1 + 0.01 / 8)))
    assert any(note.startswith("Approximated: i* is the mean over the layers, which differ by up to 0.87%") for note in notes)
    content["key_value_params"][0][0] *= 2
    with pytest.raises(ConversionError, match="i[*] must be one vector"):
        convert(save(tmp_path, content), pipe, name="my-teddy", superclass="teddy")


@pytest.mark.numeric
@pytest.mark.parametrize("names", [None, ORIGINAL], ids=["diffusers", "original"])
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "state_dict"])
def test_state_dict_converts_exactly(pipe, truth, tmp_path, names, wrap):
    state = state_dict(truth, names=names)
    concept, _ = convert(save(tmp_path, {"state_dict": state} if wrap else state), pipe, name="my-teddy", superclass="teddy")
    check_common(concept, truth)
    assert torch.equal(concept.value_outputs, truth.value_outputs())
    assert concept.key_outputs is None


@pytest.mark.numeric
def test_state_dict_of_an_older_version_without_covariance(pipe, truth, tmp_path):
    state = state_dict(truth, prefix="", suffix="concept_output")
    path = save(tmp_path, {key: value for key, value in state.items() if not key.endswith("C_inv")})
    with pytest.raises(ConversionError, match="holds no C.-1. Give the text encoder's covariance"):
        convert(path, pipe, name="my-teddy", superclass="teddy")

    class Given:
        fingerprint = "0123456789abcdef"

        def metric_targets(self, targets):
            return torch.linalg.solve(truth.covariance.double(), targets)

    concept, _ = convert(path, pipe, name="my-teddy", superclass="teddy", covariance=Given())
    assert concept.covariance == "0123456789abcdef"
    target, metric = truth.targets[0].double(), concept.metric_target.double()
    (similarity,) = exactly(lambda: target @ metric / (target @ metric))
    assert similarity.value == 1
    assert_close(concept.similarity(truth.targets[0]), similarity)


# Second port


@pytest.mark.numeric
def test_one_output_per_position_becomes_the_gate_weighted_mean(pipe, truth, tmp_path):
    content = chendaryen(truth)
    path, templates = save(tmp_path, content), ("a photo of a {}",)
    concept, notes = convert(path, pipe, name="my-teddy", templates=templates)
    check_common(concept, truth)
    encodings = truth.encode(pipe, truth.words[0]).double()
    inverse, target = truth.inverse.double(), truth.targets[0].double()
    keys, values = (
        torch.cat([content["target_output"][f"{ORIGINAL[name]}.{kind}.target_output"] for name in truth.base.layers], -1).double()
        for kind in ("to_k", "to_v")
    )

    def weighted():
        metric = inverse @ target
        gates = torch.sigmoid((encodings @ metric / (target @ metric) - 0.75) / 0.1)
        weights = gates**2 / (gates**2).sum()
        return locked(truth, weights @ keys), weights @ values

    s, outputs = exactly(weighted)
    assert_close(concept.superclass_encoding, s)
    assert_close(concept.value_outputs, outputs)
    assert concept.recipe == {"source": CHENDARYEN, "steps": 400}
    assert sum(note.startswith("Approximated: the port has one o* per token position") for note in notes) == 2
    with pytest.raises(ConversionError, match="holds one concept, so index must be 0, got 1"):
        convert(path, pipe, name="my-teddy", index=1)


@pytest.mark.numeric
def test_equal_rows_lose_nothing(pipe, truth, tmp_path):
    content = chendaryen(truth)
    for key, rows in content["target_output"].items():
        content["target_output"][key] = rows[WORD_TOKEN].expand(77, -1).clone()
    concept, notes = convert(save(tmp_path, content), pipe, name="my-teddy")
    outputs = truth.value_outputs().double()
    assert_close(concept.value_outputs, Exact(outputs, outputs.abs()))  # the weighted mean of equal rows
    assert_locked(concept, truth)
    assert any("differ from it by 0%" in note for note in notes)


def test_what_a_pipeline_must_be(pipe, truth, tmp_path):
    path = save(tmp_path, package(truth))
    with pytest.raises(ConversionError, match="a Base is not enough"):
        convert(path, truth.base, name="my-teddy", superclass="teddy")
    with pytest.raises(ConversionError, match="one word embedding, but .* needs one for each of its text encoders"):
        convert(path, tiny_sdxl(), name="my-teddy", superclass="teddy")
    with pytest.raises(ValueError, match="name must be 1 to 32 characters"):
        convert(path, pipe, name="My Teddy", superclass="teddy")
    with pytest.raises(ConversionError, match="does not say its superclass"):
        convert(path, pipe, name="my-teddy")
    with pytest.raises(ConversionError, match="each template must hold"):
        convert(path, pipe, name="my-teddy", superclass="teddy", templates=("a photo",))
    offloaded = tiny_sd()
    offloaded.text_encoder.to("meta")
    with pytest.raises(UnsupportedPipeline, match="offloaded"):
        convert(path, offloaded, name="my-teddy", superclass="teddy")
    offloaded = tiny_sd()
    offloaded.unet.to("meta")
    with pytest.raises(ConversionError, match="UNet's weights are offloaded"):
        convert(path, offloaded, name="my-teddy", superclass="teddy")
