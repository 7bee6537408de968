"""perfusion.convert, on files built to the exact layouts of the two ports."""

import collections
import os
import pickle
import sys
import types
import zipfile

import pytest
import torch

from perfusion import convert as module
from perfusion.base import UnsupportedPipeline, cross_attention_layers, describe_base
from perfusion.convert import CHENDARYEN, LUCIDRAINS, ConversionError, convert
from tests.perfusion.tiny import tiny_sd, tiny_sdxl

# The tiny pipeline's layers under the names of the original Stable Diffusion code, which count residual blocks:
# one layer per down block, two per up block.
ORIGINAL = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2": "input_blocks.1.1.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2": "output_blocks.2.1.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2": "output_blocks.3.1.transformer_blocks.0.attn2",
    "mid_block.attentions.0.transformer_blocks.0.attn2": "middle_block.1.transformer_blocks.0.attn2",
}
WORD_TOKEN = 5  # of "a photo of a *"


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


class Truth:
    """A concept as a port would have trained it: consistent with the pipeline's weights and text encoder."""

    def __init__(self, pipe, seed=0, concepts=1):
        self.generator = torch.Generator().manual_seed(seed)
        self.base = describe_base(pipe)
        layers = cross_attention_layers(pipe.unet)
        self.to_k = {name: layer.to_k.weight for name, layer in layers.items()}
        self.to_v = {name: layer.to_v.weight for name, layer in layers.items()}
        dim = self.base.encoding_dim
        token = pipe.tokenizer("teddy", add_special_tokens=False).input_ids[0]
        start = pipe.text_encoder.get_input_embeddings().weight[token]
        self.words = start + 0.01 * self.draw(concepts, dim)
        self.targets = torch.stack([self.encode(pipe, word)[WORD_TOKEN] for word in self.words])
        self.prompt = self.encode(pipe, start)  # [77, D], the superclass prompt
        self.s = self.prompt[WORD_TOKEN]
        samples = self.draw(4 * dim, dim) + self.targets[0]
        self.covariance = samples.T @ samples / len(samples)
        self.inverse = torch.linalg.inv(self.covariance)
        self.moves = {name: self.draw(len(weight)) for name, weight in self.to_v.items()}

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    @torch.no_grad()
    def encode(self, pipe, word):
        ids = pipe.tokenizer("a photo of a *", padding="max_length", return_tensors="pt").input_ids
        table = pipe.text_encoder.get_input_embeddings()
        embedded = table(ids)
        embedded[0, WORD_TOKEN] = word
        handle = table.register_forward_hook(lambda *_: embedded)
        try:
            return pipe.text_encoder(ids)[0][0]
        finally:
            handle.remove()

    def keys(self, name):
        return self.to_k[name] @ self.s

    def values(self, name):
        return self.to_v[name] @ self.s + self.moves[name]

    def value_outputs(self):
        return torch.cat([self.values(name) for name in self.base.layers])


@pytest.fixture
def truth(pipe):
    return Truth(pipe)


def save(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    return path


def package(truth, order=None, concepts=1):
    """What the first port's `save` writes."""
    pairs = []
    for name in order or truth.base.layers:
        for output in (truth.keys(name), truth.values(name)):
            pairs.append([truth.targets.clone(), output.repeat(concepts, 1)])
    return {"embed_params": truth.words.clone(), "key_value_params": pairs, "C_inv": truth.inverse}


def state_dict(truth, prefix="unet.", names=None, suffix="concept_outputs"):
    state = {"text.wrapped_embed.concepts": truth.words.clone(), "text.wrapped_embed.embed.weight": torch.zeros(9, 16)}
    for name in truth.base.layers:
        path = prefix + (names[name] if names else name)
        for projection, output in (("to_k", truth.keys(name)), ("to_v", truth.values(name))):
            state[f"{path}.{projection}.{suffix}"] = output[None]
            state[f"{path}.{projection}.weight"] = torch.zeros(len(output), 16)
            state[f"{path}.{projection}.initted"] = torch.ones(1, 1, dtype=torch.bool)
            state[f"{path}.{projection}.ema_concept_text_encs"] = truth.targets.clone()
            state[f"{path}.{projection}.C_inv"] = truth.inverse
    return state


class FakeConfig:
    """Builds the configuration objects that a real file of the second port holds in place of a list of words."""

    def __init__(self):
        self.modules = {}
        classes = {"listconfig": "ListConfig", "dictconfig": "DictConfig", "nodes": "AnyNode", "base": "ContainerMetadata"}
        for module_name, class_name in classes.items():
            path = f"omegaconf.{module_name}"
            cls = type(class_name, (), {"__module__": path})
            self.modules.setdefault("omegaconf", types.ModuleType("omegaconf"))
            self.modules[path] = types.ModuleType(path)
            setattr(self.modules[path], class_name, cls)
            setattr(self, class_name, cls)

    def words(self, *words):
        config = self.ListConfig()
        config._parent = self.DictConfig()
        config._metadata = self.ContainerMetadata()
        config._metadata.__dict__.update(element_type=object, object_type=list, key_type=int, optional=True)
        config._metadata.element_type = dict
        config._metadata.resolver_cache = collections.defaultdict(dict)
        config._content = []
        for word in words:
            node = self.AnyNode()
            node.__dict__.update(_parent=config, _val=word)
            config._content.append(node)
        return config


def chendaryen(truth, rows=77, names=ORIGINAL, words=("teddy",)):
    """What the second port's `on_save_checkpoint` leaves: one output per token position."""
    parameters = torch.nn.ParameterDict()
    parameters["*"] = torch.nn.Parameter(truth.words[:1].clone())
    outputs = {}
    for name in truth.base.layers:
        outputs[f"{names[name]}.to_k.target_output"] = truth.prompt[:rows] @ truth.to_k[name].T
        outputs[f"{names[name]}.to_v.target_output"] = truth.prompt[:rows] @ truth.to_v[name].T + truth.moves[name]
    return {
        "global_step": 400,
        "C_inv": truth.inverse,
        "target_input": truth.targets[0].clone(),
        "embedding": {"initializer_words": list(words), "string_to_token": {"*": 265}, "string_to_param": parameters},
        "target_output": outputs,
    }


def check_common(concept, truth):
    torch.testing.assert_close(concept.target, truth.targets[0])
    torch.testing.assert_close(concept.word_embeddings[0], truth.words[0])
    metric = truth.inverse @ truth.targets[0]
    torch.testing.assert_close(concept.metric_target, metric / metric.abs().max(), atol=1e-4, rtol=1e-3)
    assert concept.base == truth.base and (concept.name, concept.superclass) == ("my-teddy", "teddy")
    assert concept.covariance.startswith("inverse-")


# First port


def test_package_converts_exactly(pipe, truth, tmp_path):
    concept, notes = convert(save(tmp_path, package(truth)), pipe, name="my-teddy", superclass="teddy", author="A", license="CC0-1.0")
    check_common(concept, truth)
    torch.testing.assert_close(concept.value_outputs, truth.value_outputs())
    torch.testing.assert_close(concept.superclass_encoding, truth.s, atol=1e-4, rtol=1e-3)
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
    torch.testing.assert_close(concept.value_outputs, truth.value_outputs())
    assert concept.key_outputs is None


def test_package_order_is_decided_by_the_lock_where_widths_agree(tmp_path):
    pipe = tiny_sd(unet=dict(block_out_channels=(8, 8)))
    truth = Truth(pipe)
    order = [name for part in ("down", "mid", "up") for name in truth.base.layers if name.startswith(part)]
    for layers in (order, list(truth.base.layers)):
        concept, _ = convert(save(tmp_path, package(truth, layers)), pipe, name="my-teddy", superclass="teddy")
        torch.testing.assert_close(concept.value_outputs, truth.value_outputs())
    content = package(truth)
    for pair in content["key_value_params"][0::2]:
        pair[1] = truth.draw(*pair[1].shape)
    with pytest.raises(ConversionError, match="order of the layers cannot be told"):
        convert(save(tmp_path, content), pipe, name="my-teddy", superclass="teddy")


def test_unlocked_keys_are_kept(pipe, truth, tmp_path):
    content = package(truth)
    keys = content["key_value_params"][0::2]
    for pair in keys:
        pair[1] = pair[1] + truth.draw(*pair[1].shape)
    concept, notes = convert(save(tmp_path, content), pipe, name="my-teddy", superclass="teddy")
    torch.testing.assert_close(concept.key_outputs, torch.cat([output[0] for _, output in keys]))
    s = module._Reader(pipe).superclass_encoding("teddy", module.TEMPLATES)
    torch.testing.assert_close(concept.superclass_encoding, s.float())
    assert any("without the key lock" in note for note in notes)
    with pytest.raises(ConversionError, match="'armadillo' is 6 tokens"):
        convert(save(tmp_path, content), pipe, name="my-teddy", superclass="armadillo")


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
    torch.testing.assert_close(concept.target, truth.targets[2])
    torch.testing.assert_close(concept.word_embeddings[0], truth.words[2])


def test_targets_that_differ_by_layer_are_averaged_or_refused(pipe, truth, tmp_path):
    content = package(truth)
    content["key_value_params"][0][0] *= 1.01
    concept, notes = convert(save(tmp_path, content), pipe, name="my-teddy", superclass="teddy")
    torch.testing.assert_close(concept.target, truth.targets[0] * (1 + 0.01 / 8))
    assert any(note.startswith("Approximated: i* is the mean over the layers, which differ by up to 0.87%") for note in notes)
    content["key_value_params"][0][0] *= 2
    with pytest.raises(ConversionError, match="i[*] must be one vector"):
        convert(save(tmp_path, content), pipe, name="my-teddy", superclass="teddy")


@pytest.mark.parametrize("names", [None, ORIGINAL], ids=["diffusers", "original"])
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "state_dict"])
def test_state_dict_converts_exactly(pipe, truth, tmp_path, names, wrap):
    state = state_dict(truth, names=names)
    concept, _ = convert(save(tmp_path, {"state_dict": state} if wrap else state), pipe, name="my-teddy", superclass="teddy")
    check_common(concept, truth)
    torch.testing.assert_close(concept.value_outputs, truth.value_outputs())
    assert concept.key_outputs is None


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
    assert concept.similarity(truth.targets[0]).item() == pytest.approx(1, abs=1e-4)


# Second port


def test_one_output_per_position_becomes_the_gate_weighted_mean(pipe, truth, tmp_path):
    path = save(tmp_path, chendaryen(truth))
    templates = ("a photo of a {}",)
    concept, notes = convert(path, pipe, name="my-teddy", templates=templates)
    check_common(concept, truth)
    encodings = truth.encode(pipe, truth.words[0]).double()
    metric = (truth.inverse @ truth.targets[0]).double()
    gates = torch.sigmoid((encodings @ metric / (truth.targets[0].double() @ metric) - 0.75) / 0.1)
    weights = (gates**2 / (gates**2).sum()).float()
    expected_s = weights @ truth.prompt
    torch.testing.assert_close(concept.superclass_encoding, expected_s, atol=1e-3, rtol=1e-3)
    expected = torch.cat([truth.to_v[name] @ expected_s + truth.moves[name] for name in truth.base.layers])
    torch.testing.assert_close(concept.value_outputs, expected, atol=1e-4, rtol=1e-3)
    assert concept.recipe == {"source": CHENDARYEN, "steps": 400}
    assert sum(note.startswith("Approximated: the port has one o* per token position") for note in notes) == 2
    with pytest.raises(ConversionError, match="holds one concept, so index must be 0, got 1"):
        convert(path, pipe, name="my-teddy", index=1)


def test_equal_rows_lose_nothing(pipe, truth, tmp_path):
    content = chendaryen(truth)
    for key, rows in content["target_output"].items():
        content["target_output"][key] = rows[WORD_TOKEN].expand(77, -1).clone()
    concept, notes = convert(save(tmp_path, content), pipe, name="my-teddy")
    torch.testing.assert_close(concept.value_outputs, truth.value_outputs())
    torch.testing.assert_close(concept.superclass_encoding, truth.s, atol=1e-4, rtol=1e-3)
    assert any("differ from it by 0%" in note for note in notes)


def test_configuration_objects_in_the_file_are_read_and_never_built(pipe, truth, tmp_path, monkeypatch):
    """Real files keep the initial word inside configuration objects, and the whole configuration behind them."""
    fake, content = FakeConfig(), chendaryen(truth)
    content["embedding"]["initializer_words"] = fake.words("teddy")
    with monkeypatch.context() as patch:
        for name, fake_module in fake.modules.items():
            patch.setitem(sys.modules, name, fake_module)
        path = save(tmp_path, content)
    monkeypatch.setitem(sys.modules, "omegaconf", None)  # an import would fail
    before = set(torch.serialization.get_safe_globals())
    assert convert(path, pipe, name="my-teddy").concept.superclass == "teddy"
    assert convert(path, pipe, name="my-teddy", superclass="bear").concept.superclass == "bear"
    assert set(torch.serialization.get_safe_globals()) == before


def test_parameters_of_an_older_torch(pipe, truth, tmp_path):
    """torch before 1.12 kept a ParameterDict's entries in `_parameters` alone."""
    content = chendaryen(truth)
    del content["embedding"]["string_to_param"].__dict__["_keys"]
    assert convert(save(tmp_path, content), pipe, name="my-teddy").concept.name == "my-teddy"


# Refusals


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda c: c.update(embed_params=None), "embed_params is None: the word's embedding was not saved"),
        (lambda c: c.update(embed_params=torch.zeros(1, 512)), r"embed_params must be .* shape \(1, 16\) .*got torch.float32 \(1, 512\)"),
        (lambda c: c["key_value_params"].pop(), "has 7 entries, and .* needs 8: a key and a value output per layer"),
        (lambda c: c.update(key_value_params=3), "must be a list of pairs"),
        (lambda c: c["key_value_params"][0].__setitem__(1, torch.zeros(1, 9)), r"widths \[9, 8, 8, 16\] are not those of"),
        (lambda c: c["key_value_params"][0].__setitem__(1, torch.full((1, 8), float("nan"))), "o[*] holds NaN or infinity"),
        (lambda c: c["key_value_params"][0].__setitem__(0, torch.zeros(1, 768)), r"i[*] must be .* shape \(1, 16\)"),
        (lambda c: [pair[0].zero_() for pair in c["key_value_params"]], "never trained"),
        (lambda c: c.update(C_inv=torch.zeros(3, 3)), r"C_inv must be a floating point tensor of shape \(16, 16\)"),
        (lambda c: c.update(C_inv=-torch.eye(16)), "energy .* is not positive"),
        (lambda c: c.update(C_inv=torch.zeros(1).expand(10**9, 10**9)), "C_inv must be"),
        (lambda c: c.update(C_inv=torch.zeros(16, 16, dtype=torch.int32)), "C_inv must be .*int32"),
        (lambda c: c.update(C_inv=torch.eye(16).to_sparse()), "C_inv must be"),
        (lambda c: c.pop("C_inv"), "holds no C.-1"),
        (lambda c: c.update(embed_params=30 * torch.ones(1, 16).cumsum(1)), "similarity to i[*] is .*trained with another text encoder"),
    ],
)
def test_packages_that_do_not_fit_are_refused(pipe, truth, tmp_path, edit, message):
    content = package(truth)
    edit(content)
    with pytest.raises(ConversionError, match=message):
        convert(save(tmp_path, content), pipe, name="my-teddy", superclass="teddy")


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda c: c["target_output"].popitem(), "once for each of 4 layers, but for mid_block.* it is there 0 times"),
        (lambda c: c["target_output"].update({"input_blocks.9.attn2.to_k.target_output": torch.zeros(77, 8)}), "is there for 5 layers"),
        (lambda c: c.update(target_output={k: v[:50] for k, v in c["target_output"].items()}), r"must be .* shape \(77, 8\) .*\(50, 8\)"),
        (lambda c: c.update(embedding=3), "embedding and target_output must be dictionaries"),
        (lambda c: c["embedding"].update(string_to_param={}), "must hold one placeholder word, it holds 0"),
        (lambda c: c["embedding"].update(string_to_param={"*": torch.zeros(3, 16)}), "has 3 embeddings .num_vectors_per_token"),
        (lambda c: c["embedding"].update(initializer_words=None), "does not say its superclass"),
        (lambda c: c.update(target_input=torch.ones(768)), r"target_input must be .*\(16\)"),
    ],
)
def test_position_checkpoints_that_do_not_fit_are_refused(pipe, truth, tmp_path, edit, message):
    content = chendaryen(truth)
    edit(content)
    with pytest.raises(ConversionError, match=message):
        convert(save(tmp_path, content), pipe, name="my-teddy")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"weights": 1}, "not a checkpoint of a known port; at its top it holds: 'weights'. Known are lucidrains"),
        ([1], "at its top it holds: list"),
        ({"a.ema_concept_text_encs": torch.zeros(1, 16)}, "must hold one embedding wrapper's 'concepts', it holds 0"),
    ],
)
def test_other_content_is_refused(pipe, tmp_path, content, message):
    with pytest.raises(ConversionError, match=message):
        convert(save(tmp_path, content), pipe, name="my-teddy", superclass="teddy")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/perfusion-convert-was-hacked",)


def test_code_in_a_checkpoint_is_named_and_not_run(pipe, truth, tmp_path):
    path = save(tmp_path, {**package(truth), "bomb": Bomb()})
    with pytest.raises(ConversionError, match=r"asks to load (posix|nt).system, which checkpoints of these ports do not hold. Refused"):
        convert(path, pipe, name="my-teddy", superclass="teddy")
    assert not os.path.exists("/tmp/perfusion-convert-was-hacked")


def test_files_that_are_no_checkpoints_are_refused(pipe, tmp_path, monkeypatch):
    path = tmp_path / "x.pt"

    def refused(message):
        with pytest.raises(ConversionError, match=message):
            convert(path, pipe, name="my-teddy", superclass="teddy")

    for data in (b"", b"text", pickle.dumps({"a": 1})):
        path.write_bytes(data)
        refused("not a torch checkpoint")
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    refused("If it is older, load and save it once")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", "world")
    refused("cannot be read safely by torch")
    torch.save({"a": torch.ones(300)}, path)
    path.write_bytes(path.read_bytes()[:-30])
    refused("not a torch checkpoint|cannot be read safely")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(3_000_000))
    monkeypatch.setattr(module, "MAX_BYTES", 1_000_000)
    refused("unpacks to 3,000,000 bytes")
    path.write_bytes(bytes(1_000_001))
    refused("has 1,000,001 bytes")
    with pytest.raises(ConversionError, match="not a regular file"):
        convert(tmp_path, pipe, name="my-teddy")
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "none", pipe, name="my-teddy")


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


def test_original_names_of_stable_diffusion():
    """Spot checks against the published layout of v1 checkpoints."""
    for layer, original in {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2": "input_blocks.1.1.transformer_blocks.0.attn2",
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2": "input_blocks.8.1.transformer_blocks.0.attn2",
        "mid_block.attentions.0.transformer_blocks.0.attn2": "middle_block.1.transformer_blocks.0.attn2",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2": "output_blocks.3.1.transformer_blocks.0.attn2",
        "up_blocks.3.attentions.2.transformer_blocks.0.attn2": "output_blocks.11.1.transformer_blocks.0.attn2",
    }.items():
        assert list(module._original_name(layer, 2)) == [original]
    assert list(module._original_name("encoder.cross", 2)) == []
    assert list(module._original_name("other_block.attentions.0.attn2", 2)) == []
    assert list(module._original_name("down_blocks.0.attentions.0.transformer_blocks.0.attn2", [1, 2])) == []
