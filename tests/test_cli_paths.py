"""Paths on the command line: `~`, bare names beside a checkpoint, commands that can be typed again, and names that two runs want."""

import importlib
import inspect
import os
import re
import shlex
import struct
import subprocess
import sys
import typing
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from perfusion import cli
from perfusion.base import describe_base
from perfusion.cli.generate import _source
from perfusion.cli.models import _file_and_scale, add_parts
from perfusion.cli.serve import named_models
from perfusion.concept import Concept
from perfusion.models import ModelError, load_pipeline, resolve
from perfusion.runtime.manifest import ExportedFolderError, Manifest
from perfusion.serve.store import Store
from perfusion.training.data import read_pictures
from perfusion.training.folder import _named
from tests.perfusion.editing import make_concept
from tests.perfusion.learning import covariance_of, settings, write_pictures
from tests.perfusion.tiny import tiny_sd
from tests.stand_in import save_concept, save_model


def function_of(name):
    return getattr(importlib.import_module(f"perfusion.cli.{name}"), name)


def parameters():
    """(command, parameter, kind of its value, its metavar and help) of all commands."""
    for name in cli.COMMANDS:
        for parameter in inspect.signature(function_of(name), eval_str=True).parameters.values():
            if typing.get_args(parameter.annotation):
                value, info, *_ = typing.get_args(parameter.annotation)
                yield name, parameter.name, str(value), info


PATHS = [(command, parameter) for command, parameter, value, _ in parameters() if "Path" in value]
# texts that may be paths, and other things: each has its own way to tell, tested below
TEXTS = {"model": "a name, a path or an id", "concept": "NAME=FILE", "embedding": "WORD=FILE", "lora": "FILE:0.8", "resume": "latest, or a path",
         "store": "a folder or an fsspec URL", "database": "a URL"}  # fmt: skip


@pytest.mark.parametrize(("command", "parameter"), PATHS)
def test_home_is_expanded_in_every_path(command, parameter, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    function, got = function_of(command), {}

    def instead(**given):
        got.update(given)

    instead.__signature__ = inspect.signature(function)
    instead.__annotations__, instead.__doc__ = typing.get_type_hints(function, include_extras=True), function.__doc__
    monkeypatch.setattr(importlib.import_module(f"perfusion.cli.{command}"), command, instead)
    words = []
    for one in cli._command(command).params:
        if one.param_type_name == "argument":
            words.append("~/here" if one.name == parameter else "x")
        elif one.name == parameter:
            words.append(f"{one.opts[0]}=~/here")
    result = CliRunner().invoke(cli.app, [command, *words], prog_name="perfusion")
    assert result.exit_code == 0, result.output
    assert got[parameter] == tmp_path / "here"


def test_texts_that_may_be_paths_are_known():
    named = {
        parameter for _, parameter, value, info in parameters()
        if "str" in value and "Path" not in value and (parameter == "model" or getattr(info, "metavar", None) == "FILE" or "folder" in (info.help or ""))
    }  # fmt: skip
    assert named == set(TEXTS)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save_model(tmp_path / "model")
    pipe = tiny_sd()
    (tmp_path / "loras").mkdir()
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
    save_file({f"{key}.lora_A.weight": torch.ones(1, 16), f"{key}.lora_B.weight": torch.ones(8, 1)}, tmp_path / "loras" / "style.safetensors")
    (tmp_path / "embeddings").mkdir()
    save_file({"<sks>": torch.ones(1, pipe.text_encoder.config.hidden_size)}, tmp_path / "embeddings" / "sks.safetensors")
    return tmp_path


def test_home_in_texts(home):
    assert resolve("~/model") == home / "model"
    assert _source("~/a.safetensors") == (None, home / "a.safetensors") and _source("x=~/a.safetensors") == ("x", home / "a.safetensors")
    pipe = load_pipeline("~/model", device="cpu")
    assert named_models(["m=~/model"]) == {"m": str(home / "model")}
    assert _named(None, "~/run/step-000001.safetensors") == home / "run" / "step-000001.safetensors"
    Store("~/store").put(b"x")
    assert (home / "store").is_dir()
    assert add_parts(pipe, "~/model", ["<s>=~/embeddings/sks.safetensors"], ["~/loras/style.safetensors:0.5"]) == ["<s>"]
    assert pipe.get_active_adapters() == ["style"]
    make_concept(describe_base(pipe), "mine").save("~/mine.safetensors")
    assert (home / "mine.safetensors").is_file() and Concept.load("~/mine.safetensors").name == "mine"


@pytest.mark.parametrize("model", ["model", "checkpoint.safetensors"])
@pytest.mark.parametrize("name", ["style", "style.safetensors", "style:0.5", "style.safetensors:0.5"])
def test_a_bare_name_is_looked_for_beside_the_model(home, model, name, monkeypatch):
    """In the model's own folder, in a folder of LoRAs in it, and in one beside it; the folder of a single file is where it lies."""
    (home / "checkpoint.safetensors").touch()
    monkeypatch.chdir(home / "model")
    pipe = load_pipeline(home / "model", device="cpu")
    add_parts(pipe, str(home / model), ["sks", "<other>=sks"], [name])
    weight = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_v
    assert weight.scaling["style"] == (0.5 if ":" in name else 1.0)
    assert {"sks", "<other>"} <= set(pipe.tokenizer.get_added_vocab())


def test_a_file_whose_name_ends_like_a_strength(home, monkeypatch):
    monkeypatch.chdir(home / "loras")
    (home / "loras" / "a:1").write_bytes((home / "loras" / "style.safetensors").read_bytes())
    assert _file_and_scale("a:1") == ("a:1", 1.0) and _file_and_scale("a:0.5") == ("a", 0.5)
    assert _file_and_scale("a:1:0.5") == ("a:1", 0.5) and _file_and_scale(str(home / "loras" / "a:1")) == (str(home / "loras" / "a:1"), 1.0)
    assert _file_and_scale("C:/x.safetensors") == ("C:/x.safetensors", 1.0) and _file_and_scale(":0.5") == (":0.5", 1.0)
    with pytest.raises(ValueError, match="strength of a LoRA must be a finite number, got 'nan' in --lora style:nan"):
        _file_and_scale("style:nan")


def test_two_loras_of_one_name(home, monkeypatch):
    """Of two folders, and two whose names differ by what an adapter's name cannot hold; each keeps its own strength."""
    monkeypatch.chdir(home)
    file = (home / "loras" / "style.safetensors").read_bytes()
    (home / "more").mkdir()
    for name in ("more/style.safetensors", "more/a b.safetensors", "more/a.b.safetensors", "more/style_2.safetensors"):
        (home / name).write_bytes(file)
    pipe = load_pipeline(home / "model", device="cpu")
    given = ["loras/style.safetensors:0.1", "more/style.safetensors:0.2", "more/style_2.safetensors:0.3", "more/a b.safetensors:0.4",
             "more/a.b.safetensors:0.5", "loras/style.safetensors:0.6"]  # fmt: skip
    add_parts(pipe, str(home / "model"), None, given)
    weight = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_v
    assert sorted(weight.scaling.values()) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert sorted(pipe.get_active_adapters()) == sorted(weight.scaling) and len(weight.scaling) == 6


def test_a_bare_name_that_is_nowhere(home):
    pipe = load_pipeline(home / "model", device="cpu")
    with pytest.raises(ModelError, match="there is no file 'nothing', here or beside the model"):
        add_parts(pipe, str(home / "model"), None, ["nothing"])
    with pytest.raises(ModelError, match="there is no file 'folder/style'"):  # a path is a path
        add_parts(pipe, str(home / "model"), None, ["folder/style"])


# Commands that are printed can be typed


def commands_in(text):
    """Every `perfusion ...` of an output, as a shell splits it; ValueError for one that no shell would take."""
    return [shlex.split(found) for found in re.findall(r"(?:^|`|Try: )(perfusion [^`\n]*?)(?=`|$| draws with it)", text, re.MULTILINE)]


def test_printed_commands_can_be_typed(home, monkeypatch):
    work = home / "a folder; with $(spaces) and 'quotes'"
    work.mkdir()
    monkeypatch.chdir(work)
    save_model(Path("my model"))
    covariance_of(tiny_sd()).save(work / "c.safetensors")
    write_pictures(Path("my pictures"))

    def run(*words):
        result = CliRunner().invoke(cli.app, list(map(str, words)), prog_name="perfusion")
        assert result.exit_code == 0, result.output
        return commands_in(result.stdout)

    (said,) = run("train", "my pictures", "--superclass", "teddy", "--name", "mine", "--model", "my model", "--covariance", "c.safetensors",
                  "--steps", 1, "--batch-size", 1, "--no-tensorboard", "--validation-every", 0, "--output", work / "the concept")  # fmt: skip
    assert said == ["perfusion", "generate", "a photo of a <mine>", "--concept", str(work / "the concept" / "mine.safetensors"), "--model", "my model"]
    assert run(*said[1:], "--steps", 1, "--output", "x.png") == [] and Path("x.png").is_file()

    # an export's, which is slow to make: what it prints, and what is said of a folder that is none
    with pytest.raises(ExportedFolderError) as caught:
        Manifest.read(work)
    assert commands_in(str(caught.value)) == [["perfusion", "export", "MODEL", str(work)]]


def test_no_command_is_printed_unquoted():
    """Texts with a command in them hold no value that was put in as it is."""
    for path in Path(cli.__file__).parents[1].rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            found = re.search(rf"perfusion (?:{'|'.join(cli.COMMANDS)}) [^`\"']*\{{", line)
            assert found is None, (path.name, found[0])


# A photo of 200 megapixels is refused for what it is


def huge(path, width=20_000, height=10_000):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("name", ["1.png", "0-masklabel.png"])
def test_two_hundred_megapixels(tmp_path, name):
    folder = write_pictures(tmp_path / "in", mask=True)
    huge(folder / name)
    with pytest.raises(ValueError, match=rf"{name}.*it has 200 megapixels, and at most 179 are read. Scale it down"):
        read_pictures(folder, settings(), 16)


@pytest.mark.parametrize("option", ["--init-image", "--mask-image"])
def test_two_hundred_megapixels_to_start_from(home, monkeypatch, option):
    monkeypatch.chdir(home)
    concept, small = save_concept(home / "teddy.safetensors", "teddy"), home / "small.png"
    tiny_sd()("a teddy", num_inference_steps=1).images[0].save(small)
    given = ["--init-image", str(small), "--mask-image", str(small)]
    given[given.index(option) + 1] = str(huge(home / "huge.png"))
    words = ["generate", "a <teddy>", "--concept", str(concept), "--model", str(home / "model"), "--steps", "1", *given]
    result = CliRunner().invoke(cli.app, words, prog_name="perfusion")
    assert result.exit_code == 2 and "it has 200 megapixels" in result.stderr and "huge.png" in result.stderr, result.output


# Two runs, one folder


def test_runs_at_once_into_one_folder(home, monkeypatch):
    """Real processes, one --output: every picture of each is there, and whole."""
    monkeypatch.chdir(home)
    concept = save_concept(home / "teddy.safetensors", "teddy")
    words = ["generate", "a <teddy>", "--concept", str(concept), "--model", "model", "--steps", "1", "--count", "2", "--device", "cpu"]
    program = (
        "import os, pathlib, time, perfusion.cli as cli, perfusion.cli.generate as generate\n"
        "files = generate._files\n"
        "def _files(*given):\n"  # each looks at the folder before any of them writes into it
        "    found = files(*given); pathlib.Path(f'ready-{os.getpid()}').touch()\n"
        "    while len(list(pathlib.Path().glob('ready-*'))) < 2: time.sleep(0.01)\n"
        "    return found\n"
        "generate._files = _files\n"
        "cli.main()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([sys.executable, "-c", program, *words, "--seed", str(10 * number), "--output", "out/x.png"],
                         env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]  # fmt: skip
    ends = [run.communicate(timeout=600) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], ends
    seeds, sheets = [], 0
    for file in (home / "out").glob("*.png"):
        with Image.open(file) as picture:
            picture.load()
            sheets += "\n" in picture.text["prompt"] or picture.size != (16, 16)
            seeds += [picture.text["seed"]] if picture.size == (16, 16) else []
    assert sorted(seeds) == ["0", "1", "10", "11"] and sheets == 2
