"""perfusion.convert.checkpoint: what is read of a file from a stranger, and what is refused."""

import collections
import os
import pickle
import sys
import types
import zipfile

import pytest
import torch

from perfusion.convert import ConversionError, checkpoint, convert
from tests.perfusion.checkpoints import Truth, chendaryen, package, save
from tests.perfusion.tiny import tiny_sd


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture
def truth(pipe):
    return Truth(pipe)


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
    monkeypatch.setattr(checkpoint, "MAX_BYTES", 1_000_000)
    refused("unpacks to 3,000,000 bytes")
    path.write_bytes(bytes(1_000_001))
    refused("has 1,000,001 bytes")
    with pytest.raises(ConversionError, match="not a regular file"):
        convert(tmp_path, pipe, name="my-teddy")
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "none", pipe, name="my-teddy")
