"""Paths that no file can have are refused in a sentence, wherever people give one."""

import os
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from perfusion import cli, hub
from perfusion.base import describe_base
from perfusion.captions import read_captions
from perfusion.checkpoint_file import load_vae
from perfusion.concept import Concept
from perfusion.convert import convert
from perfusion.covariance import Covariance
from perfusion.demo.run import run_demo
from perfusion.exporting import export
from perfusion.files import user_path
from perfusion.masks import ClipSeg
from perfusion.models import ModelError, add_embedding, add_lora, load_pipeline
from perfusion.runtime import Runtime
from perfusion.serve.settings import Settings
from perfusion.training.data import read_pictures
from tests.perfusion.editing import make_concept
from tests.perfusion.learning import covariance_of, learn, settings, write_pictures
from tests.perfusion.tiny import tiny_sd

IMPOSSIBLE = {
    "zero byte": ("a\0b", "holds a zero byte"),
    "unknown home": ("~nobody-of-this-name/x", "begins with the home of a user 'nobody-of-this-name'"),
    "long name": ("x" * 300, "is too long: a name may have 255 bytes"),
    "long name of few letters": ("é" * 200, "is too long: a name may have 255 bytes"),
    "long path": ("ab/" * 2000, "is too long"),
    "lone surrogate": ("a\ud800", "cannot be a file's name in utf-8"),
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("paths") / "pictures")


def places(pipe, pictures):
    """What takes a path, each as a function of it."""
    concept = make_concept(describe_base(pipe), "mine")
    return {
        "load_pipeline": load_pipeline,
        "load_vae": lambda path: load_vae(path, Path(), None),
        "vae": lambda path: load_pipeline("toybox", device="cpu", vae=path),
        "add_embedding": lambda path: add_embedding(pipe, path),
        "add_lora": lambda path: add_lora(pipe, path),
        "Concept.load": Concept.load,
        "Concept.save": concept.save,
        "Covariance.load": Covariance.load,
        "Covariance.save": covariance_of(pipe).save,
        "read_captions": lambda path: list(read_captions(path + ".txt" if path[-1] != "/" else path)),
        "convert": lambda path: convert(path, pipe, name="mine"),
        "push": lambda path: hub.push(path, "user/mine"),
        "demo": run_demo,
        "export": lambda path: export(pipe, path),
        "Runtime": Runtime,
        "Settings": lambda path: Settings(folder=path),
        "ClipSeg": ClipSeg,
        "clipseg": lambda path: read_pictures(pictures, settings(), 16, path),
        "images": lambda path: read_pictures(path, settings(), 16),
        "a picture": lambda path: read_pictures([path], settings(), 16),
        "output": lambda path: learn(pipe, pictures, output=path),
        "resume": lambda path: learn(pipe, pictures, resume=path, output="out"),
    }


@pytest.mark.skipif(sys.platform == "win32", reason="other limits")
@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_every_place_says_it(pipe, pictures, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, says = IMPOSSIBLE[kind]
    for name, take in places(pipe, pictures).items():
        with pytest.raises(ValueError) as caught:
            take(text)
        message = str(caught.value)
        assert says in message and len(message) < 600 and type(caught.value) is not UnicodeEncodeError, (name, message)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("words", [
    ["train", "{}", "--superclass", "teddy", "--name", "mine"], ["train", ".", "--superclass", "teddy", "--name", "mine", "--output={}"],
    ["train", ".", "--superclass", "teddy", "--name", "mine", "--resume={}"], ["generate", "a", "--concept={}"], ["generate", "a", "--model={}"],
    ["generate", "a", "--output={}.png"], ["generate", "a", "--lora={}"], ["generate", "a", "--embedding={}"], ["info", "{}"], ["inspect", "{}"],
    ["convert", "{}", "--to", "lora"], ["push", "{}", "user/mine"], ["demo", "--output={}"], ["export", "toybox", "{}"],
])  # fmt: skip
@pytest.mark.parametrize("text", ["~nobody-of-this-name/x", "x" * 300])
def test_commands_say_it(words, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, [word.format(text) for word in words], prog_name="perfusion")
    assert result.exit_code == 2 and re.search("begins with the home of|is too long", result.stderr), result.output
    assert os.listdir(tmp_path) == []


def test_paths_that_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x") == tmp_path / "x" and user_path("~") == tmp_path
    Path("~nobody-of-this-name").mkdir()
    assert user_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")  # a folder that is called so
    assert user_path("./~nobody/x") == Path("~nobody/x") and user_path("x" * 255) == Path("x" * 255)
    assert user_path(Path("a b")) == Path("a b") and user_path("") == Path()
    for thing in (b"x", None, 3):
        with pytest.raises(ValueError, match="a path must be text or a pathlib.Path, got"):
            user_path(thing)


def test_a_model_error_stays_one():
    with pytest.raises(ModelError, match="zero byte.*Give 'toybox'"):
        load_pipeline("a\0b")
