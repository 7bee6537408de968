"""Ids on the Hugging Face hub, against a hub on this machine."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import save
from typer.testing import CliRunner

from perfusion import cli, hub
from perfusion.checkpoint_file import Kind
from perfusion.concept import Concept
from perfusion.hub import HubError, hub_id, model_path, pipeline_files, push
from perfusion.model_info import describe
from perfusion.models import ModelError, load_pipeline
from tests.perfusion.hub_server import hub_server
from tests.perfusion.original_layout import original_layout, pipeline_of, use_small_families
from tests.stand_in import save_concept, save_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    save_model(folder / "model")
    (folder / "model" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle that nobody needs")
    (folder / "model" / "safety_checker").mkdir()
    (folder / "model" / "safety_checker" / "model.safetensors").write_bytes(b"nor this")
    save_concept(folder / "my-teddy.safetensors", "teddy", seed=1)
    return folder


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    model = {path.relative_to(files / "model").as_posix(): path.read_bytes() for path in (files / "model").rglob("*") if path.is_file()}
    concept = {"my-teddy.safetensors": (files / "my-teddy.safetensors").read_bytes(), "README.md": b"# a card"}
    with hub_server({"user/model": model, "user/teddy": concept, "user/two": {"a.safetensors": b"", "b.safetensors": b""}}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)  # which was read from there when it was imported
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
        monkeypatch.chdir(tmp_path)
        yield running


def test_what_an_id_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "concepts").mkdir()
    assert hub_id("user/teddy") == ("user/teddy", None, None) and hub_id("user/teddy@v1") == ("user/teddy", None, "v1")
    assert hub_id("user/model/sd.safetensors@main") == ("user/model", "sd.safetensors", "main")
    # paths, there or mistyped, are never asked for on the network
    for text in ("toybox", "./user/teddy", "/user/teddy", "concepts/teddy", "concepts/teddy/x.safetensors", "user/teddy.safetensors", "a/b/c/d", "~/x", "x.ckpt", ""):
        assert hub_id(text) is None, text


def test_a_model_is_fetched_because_it_was_named_and_told_of(server, capsys):
    path = model_path("user/model")
    told = capsys.readouterr().err
    assert told.startswith("user/model: fetching ") and " MB" in told + " MB" and "(revision 0123456)" in told
    assert not [request for request in server.requests if ".bin" in request or "safety_checker" in request]
    assert type(load_pipeline("user/model", device="cpu")).__name__ == "StableDiffusionPipeline"
    server.requests.clear()
    capsys.readouterr()  # of loading
    assert model_path("user/model@v1") == path
    assert not [request for request in server.requests if "resolve" in request and request.startswith("GET")] and not capsys.readouterr().err


def test_what_a_model_is_takes_no_weights(server):
    facts = describe("user/model")
    assert facts["family"] == "custom" and facts["layers"] == 4
    assert not [request for request in server.requests if request.startswith("GET") and ("safetensors" in request or ".bin" in request)]
    whole = sum(path.stat().st_size for path in model_path("user/model").rglob("*.safetensors"))
    assert facts["bytes"] == whole == describe("user/model")["bytes"]


def test_of_a_checkpoint_file_the_header_is_fetched(server, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        use_small_families(patch)
        tensors = original_layout(pipeline_of(Kind("sd1", 9, "epsilon", True)), "sd1")
        file = save(tensors, {"title": "mine", "filler": " " * 150_000})  # a long header takes a second request
        damaged = b"\xff" * 8 + file[8:]
        server.repositories["user/file"] = {"sd.safetensors": file, "bad.safetensors": damaged, "x/other.safetensors": save({"x": tensors.popitem()[1]})}
        facts = describe("user/file/sd.safetensors")
        assert facts["layers"] == 16 and facts["inpainting"] and facts["bytes"] == len(file)
        assert server.bytes < 2**20 < len(file) and not list((tmp_path / "cache").rglob("*.safetensors"))
        with pytest.raises(ModelError, match="'user/file/x/other.safetensors' is not a checkpoint"):
            describe("user/file/x/other.safetensors")
        with pytest.raises(ModelError, match="user/file/bad.safetensors cannot be read as a .safetensors file"):
            describe("user/file/bad.safetensors")
        assert server.bytes < 2**20
        model_path("user/file/sd.safetensors")  # from now on it is in the cache, also offline
        server.requests.clear()
        assert describe("user/file/sd.safetensors") == facts and not [each for each in server.requests if "resolve" in each]
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert describe("user/file/sd.safetensors") == facts
        with pytest.raises(ModelError, match="not in the cache"):
            describe("user/two/a.safetensors")


def test_offline_the_cache_serves_and_says_what_is_missing(server, monkeypatch):
    model_path("user/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert (model_path("user/model") / "model_index.json").is_file()
    with pytest.raises(HubError, match="'user/teddy' is not in the cache, and offline mode is on .HF_HUB_OFFLINE."):
        Concept.load("user/teddy")
    with pytest.raises(HubError, match="nothing can be uploaded: offline mode"):
        push(_saved(), "user/new")
    assert not server.requests


def _saved():
    save_concept(path := Path("own.safetensors").absolute(), "teddy")
    return path


def test_what_the_hub_does_not_have(server):
    with pytest.raises(ModelError, match="'user/none' is neither a file or folder here nor a repository on the hub .*hf auth login"):
        load_pipeline("user/none", device="cpu")
    with pytest.raises(HubError, match="'user/teddy' has no revision 'v9'"):
        Concept.load("user/teddy@v9")
    with pytest.raises(HubError, match="'user/two' has several files: a.safetensors, b.safetensors. Name one, as user/two/a.safetensors"):
        Concept.load("user/two")
    with pytest.raises(HubError, match="'user/teddy' has no file 'x.safetensors'"):
        Concept.load("user/teddy/x.safetensors")


def test_a_concept_is_loaded_by_its_id(server, files):
    concept = Concept.load("user/teddy", revision="v1")
    assert concept.name == "my-teddy" and concept.superclass == "teddy"
    result = CliRunner().invoke(
        cli.app,
        ["generate", "a <pot>", "--concept", "pot=user/teddy", "--model", "user/model", "--steps", "1", "--device", "cpu"],
        prog_name="perfusion",
    )
    assert result.exit_code == 0, result.output


def test_push_uploads_file_and_card_and_keeps_the_rest_back(server, files, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(files / "my-teddy.safetensors", folder)
    for name in ("gallery.png", "references.png", "config.yaml", "log.jsonl"):
        (folder / name).write_bytes(name.encode())
    (folder / "README.md").write_text(
        '# teddy\n\n![g](gallery.png)\n\nhandle.load("my-teddy.safetensors")\n\n![r](references.png)\n\nSee [config.yaml](config.yaml).\n'
    )
    result = CliRunner().invoke(cli.app, ["push", str(folder), "user/new", "--private"], prog_name="perfusion")
    assert result.exit_code == 0 and f"Pushed to {server.endpoint}/user/new" in result.stdout, result.output
    there = server.repositories["user/new"]
    assert set(there) == {"my-teddy.safetensors", "README.md", "gallery.png"}
    card = there["README.md"].decode()
    assert "references" not in card and "config.yaml" not in card and 'handle.load("user/new")' in card and "gallery.png" in card
    assert Concept.load("user/new").name == "my-teddy"
    push(folder, "user/all", references=True)
    assert set(server.repositories["user/all"]) == {"my-teddy.safetensors", "README.md", "gallery.png", "references.png"}
    with pytest.raises(HubError, match="'teddy' is no name of a repository"):
        push(folder, "teddy")


@pytest.mark.parametrize(
    ("half", "expected"),
    [(True, ["unet/diffusion_pytorch_model.fp16.safetensors"]), (False, ["unet/diffusion_pytorch_model.safetensors"])],
)
def test_one_kind_of_weights_is_fetched(half, expected):
    names = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors",
             "unet/diffusion_pytorch_model.fp16.safetensors", "unet/model.onnx", "vae/config.json", "vae/diffusion_pytorch_model.bin",
             "tokenizer/vocab.json", "tokenizer/merges.txt"]  # fmt: skip
    index = {"_class_name": "x", "unet": ["diffusers", "x"], "vae": ["diffusers", "x"], "tokenizer": ["transformers", "x"], "image_encoder": [None, None]}
    assert pipeline_files(names, index, half) == [
        "model_index.json", "unet/config.json", *expected, "vae/config.json", "vae/diffusion_pytorch_model.bin", "tokenizer/vocab.json",
        "tokenizer/merges.txt",
    ]  # fmt: skip


def test_sharded_weights_come_with_their_index():
    names = ["unet/diffusion_pytorch_model-00001-of-00002.safetensors", "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
             "unet/diffusion_pytorch_model.safetensors.index.json", "unet/config.json"]  # fmt: skip
    assert set(pipeline_files(names, {"unet": ["diffusers", "x"]}, False)) == {"model_index.json", *names}
    assert hub._weights("diffusion_pytorch_model.safetensors.index.fp16.json") == ("safetensors", "fp16")
