"""`perfusion inspect` and `perfusion convert`."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from perfusion import cli
from perfusion.base import describe_base
from perfusion.concept import Concept
from perfusion.covariance import Covariance
from perfusion.models import TOYBOX
from tests.perfusion.checkpoints import Truth, chendaryen, package, save
from tests.perfusion.tiny import tiny_sd


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="perfusion")


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture(autouse=True)
def models(monkeypatch, pipe):
    """`--model tiny` is the tiny pipeline; another name is not found."""

    def load_pipeline(model, **_):
        if model != "tiny":
            raise OSError(f"{model} is not a model folder")
        return pipe

    monkeypatch.setattr("perfusion.models.load_pipeline", load_pipeline)


@pytest.fixture
def concept(pipe):
    base = describe_base(pipe)
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(16, generator=generator)
    return Concept(
        name="my-teddy",
        superclass="teddy",
        base=base,
        value_outputs=torch.arange(40.0),
        target=target,
        metric_target=target,
        superclass_encoding=0.5 * target,
        word_embeddings=(torch.full((16,), 0.25),),
        recipe={"steps": 400, "lr": 0.03},
        created="2025-01-31T12:00:00Z",
        covariance="0123456789abcdef",
        author="Ada [red]L[/red]",
        license="CC0-1.0",
    )


@pytest.fixture
def file(concept, tmp_path):
    concept.save(tmp_path / "my-teddy.safetensors", torch.float32)
    return tmp_path / "my-teddy.safetensors"


# inspect


def test_inspect_tells_people(file):
    result = run("inspect", file)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"{file}: a Perfusion concept, {file.stat().st_size:,} bytes, float32"
    for line in (
        "name         my-teddy; write <my-teddy> in a prompt",
        "superclass   teddy",
        "base         a custom model (text width 16, 4 cross-attention layers, 40 outputs)",
        "gate         bias 0.7, temperature 0.15; both can be set at every use",
        "keys         locked to the superclass",
        "covariance   0123456789abcdef",
        "recipe       steps 400, lr 0.03",
        "created      2025-01-31T12:00:00Z, by Ada [red]L[/red], licence CC0-1.0",
        "cosines      target with superclass 1.000, with metric target 1.000",
        "opening      88% at the concept word",
        "             21% at the plain superclass word (similarity 0.500)",
        "value outputs  layers  outputs     norm  per output",
        "down_blocks.0       1        8    11.83       4.183",
        "up_blocks.1         2       16    64.68       16.17",
        "mid_block           1       16    127.3       31.84",
    ):
        assert line in lines, f"{line!r} not in\n{result.stdout}"
    blocks = [line.split()[0] for line in lines[-3:]]
    assert blocks == ["down_blocks.0", "mid_block", "up_blocks.1"]  # as a picture passes them


def test_inspect_knows_toybox(concept, tmp_path):
    encoder = Covariance.load(TOYBOX / "covariance.safetensors").text_encoder
    dataclasses.replace(concept, base=dataclasses.replace(concept.base, text_encoder=encoder)).save(tmp_path / "a.safetensors")
    assert "\nbase         toybox (text width 16, 4 cross" in run("inspect", tmp_path / "a.safetensors").stdout


def test_inspect_tells_programs(file, concept):
    result = run("inspect", "--json", file)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["name"], facts["superclass"], facts["author"]) == ("my-teddy", "teddy", "Ada [red]L[/red]")
    assert facts["base"]["layers"] == dict(concept.base.layers) and facts["base"]["family"] == "custom"
    assert facts["bytes"] == file.stat().st_size and facts["dtype"] == "float32" and facts["keys"] == "locked"
    assert facts["recipe"] == {"steps": 400, "lr": 0.03}
    assert facts["energy"] == pytest.approx(concept.energy)
    assert facts["norms"]["target"] == pytest.approx(concept.target.norm().item())
    assert facts["norms"]["word_embeddings"] == [1.0] and facts["norms"]["key_outputs"] is None
    assert facts["superclass_similarity"] == pytest.approx(0.5)
    assert sum(group["norm"] ** 2 for group in facts["groups"]) == pytest.approx((torch.arange(40.0) ** 2).sum().item())


def test_inspect_shows_keys_of_their_own_and_what_is_not_stated(concept, tmp_path):
    bare = dataclasses.replace(concept, key_outputs=torch.ones(40), recipe={}, covariance="", author="", license="")
    bare.save(tmp_path / "c.safetensors")
    result = run("inspect", tmp_path / "c.safetensors")
    assert "float16" in result.stdout
    for line in ("keys         its own, trained without the key lock", "recipe       not stated", "covariance   not stated"):
        assert line in result.stdout.splitlines()
    assert "created      2025-01-31T12:00:00Z" in result.stdout.splitlines()


def test_inspect_exit_codes(file, tmp_path):
    missing = run("inspect", tmp_path / "none.safetensors")
    assert missing.exit_code == 2 and "none.safetensors: No such file" in missing.stderr
    assert run("inspect").exit_code == 2
    assert run("inspect", "--nonsense", file).exit_code == 2
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")
    refused = run("inspect", tmp_path / "x.pt")
    assert refused.exit_code == 3 and "perfusion convert" in refused.stderr and not refused.stdout
    file.write_bytes(file.read_bytes()[:-1])
    cut = run("inspect", "--json", file)
    assert cut.exit_code == 3 and "cut short" in cut.stderr and not cut.stdout
    folder = run("inspect", tmp_path)
    assert folder.exit_code == 3 and "not a regular file" in folder.stderr


# convert


def test_convert_writes_a_concept_and_says_what_it_did(pipe, tmp_path):
    checkpoint, output = save(tmp_path, chendaryen(Truth(pipe))), tmp_path / "out" / "c.safetensors"
    result = run("convert", checkpoint, "--name", "my-teddy", "--model", "tiny", "--output", output, "--bias", 0.5,
                 "--temperature", 0.2, "--author", "Ada", "--license", "CC0-1.0", "--dtype", "float32")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Approximated: the port has one o* per token position" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"Wrote {output}, {output.stat().st_size:,} bytes.")
    concept = Concept.load(output)
    assert (concept.name, concept.superclass, concept.bias, concept.temperature) == ("my-teddy", "teddy", 0.5, 0.2)
    assert (concept.author, concept.license) == ("Ada", "CC0-1.0")
    assert run("inspect", output).exit_code == 0


def test_convert_writes_beside_and_never_over(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = save(tmp_path, package(Truth(pipe)))
    arguments = ("convert", checkpoint, "--name", "my-teddy", "--model", "tiny", "--superclass", "teddy")
    assert run(*arguments).exit_code == 0
    before = (tmp_path / "my-teddy.safetensors").read_bytes()
    again = run(*arguments)
    assert again.exit_code == 2 and "is there already" in again.stderr
    assert (tmp_path / "my-teddy.safetensors").read_bytes() == before
    assert run(*arguments, "--overwrite", "--bias", 0.4).exit_code == 0
    assert Concept.load(tmp_path / "my-teddy.safetensors").bias == 0.4


def test_convert_exit_codes(pipe, tmp_path):
    checkpoint, output = save(tmp_path, package(Truth(pipe))), tmp_path / "c.safetensors"
    no_inverse = {**package(Truth(pipe)), "C_inv": None}
    good = {"--name": "my-teddy", "--model": "tiny", "--superclass": "teddy", "--output": output}

    def call(path=checkpoint, **changes):
        options = {**good, **{f"--{key}": value for key, value in changes.items()}}
        return run("convert", path, *(part for pair in options.items() for part in pair))

    for result, code, text in (
        (call(path=tmp_path / "none.pt"), 2, "none.pt: No such file"),
        (call(name="My Teddy"), 2, "error: a concept's name must be 1 to 32 characters"),
        (call(model="none"), 2, "none is not a model folder"),
        (call(temperature=0), 2, "temperature must be a number from"),
        (call(author="x" * 85), 2, f"error: a concept's author must be at most 64 bytes as JSON text in UTF-8, got 85: '{78 * 'x'}…\n"),
        (call(superclass=""), 3, "does not say its superclass. Give it, for example --superclass teddy.\n"),
        (call(index=4), 3, "index must be 0 to 0, got 4"),
        (call(path=save(tmp_path, {"a": 1})), 3, "not a checkpoint of a known port"),
        (call(path=save(tmp_path, no_inverse)), 3, "holds no C^-1. Give the text encoder's with --covariance FILE; "),
        (call(covariance=tmp_path / "none"), 2, "none"),
    ):
        assert result.exit_code == code and text in result.stderr, result.output
    assert run("convert", checkpoint).exit_code == 2
    assert not output.exists()


def test_convert_looks_at_what_a_file_is_and_not_at_its_ending(pipe, file, tmp_path):
    disguised = save(tmp_path, package(Truth(pipe))).rename(tmp_path / "old.safetensors")
    arguments = ("--name", "mine", "--model", "tiny", "--superclass", "teddy", "--output", tmp_path / "new.safetensors")
    assert "perfusion convert" in run("inspect", disguised).stderr
    assert run("convert", disguised, *arguments).exit_code == 0
    finished = run("convert", file, *arguments, "--overwrite")
    assert (finished.exit_code, finished.stderr) == (3, f"error: {file} is a concept already, and needs no conversion: use it as it is.\n")


# help


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_help_reads_well(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    text = " ".join(result.stdout.replace("│", " ").split())
    assert "Exit codes: 0" in text and "Nothing in the" in text
