"""`perfusion covariance` as a user meets it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from perfusion.covariance import Covariance, compute_covariance
from tests.perfusion.covariances import trained_sd
from tests.perfusion.tiny import tiny_sd


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PERFUSION_CACHE", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def command(monkeypatch):
    """Runs `perfusion covariance` on a tiny pipeline: (arguments) -> typer's result."""
    import sys
    import types

    from typer.testing import CliRunner

    from perfusion import cli

    def load_pipeline(model, **_):
        if model == "nowhere":
            raise FileNotFoundError(f"no such model: {model}")
        pipe = tiny_sd() if model == "young" else trained_sd()
        if model == "headless":
            pipe.text_encoder = None
        return pipe

    monkeypatch.setitem(sys.modules, "perfusion.models", types.SimpleNamespace(load_pipeline=load_pipeline))
    return lambda *arguments: CliRunner().invoke(cli.app, ["covariance", *map(str, arguments)], prog_name="perfusion")


def test_command(command, tmp_path):
    result = command("--model", "trained", "--count", 200, "--output", tmp_path / "c.safetensors")
    assert result.exit_code == 0, result.output
    written = Covariance.load(tmp_path / "c.safetensors")
    assert f"{written.fingerprint}, 16 x 16, of trained" in result.stdout and str(written.path) in result.stdout
    assert "200 (" in result.stdout and "everyday-200-seed0" in result.stdout and "shrinkage    none" in result.stdout
    command("--count", 200, "--output", tmp_path)
    assert Covariance.load(tmp_path / "covariance.safetensors").fingerprint == written.fingerprint


def test_command_json_and_shrinkage(command):
    result = command("--model", "young", "--count", 200, "--json")
    facts = json.loads(result.stdout)
    assert 0 < facts["shrinkage"] < 1e-4 and facts["condition"] == pytest.approx(1e6, rel=1e-3)
    assert Covariance.load(facts["file"]).fingerprint == facts["fingerprint"]
    assert "warning: the covariance of everyday-200-seed0 has condition number" in result.stderr
    facts = json.loads(command("--model", "young", "--count", 200, "--max-condition", 1e5, "--json").stdout)
    assert facts["condition"] == pytest.approx(1e5, rel=1e-3) and facts["max_condition"] == 1e5


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--model", "nowhere"], 2, "error: no such model: nowhere"),
        (["--captions", "nowhere.txt"], 2, "error: no such file of captions: nowhere.txt\n"),
        (["--max-condition", "0"], 2, "error: --max-condition must be above 1 and at most 1e12, got 0\n"),
        (["--max-condition", "nan"], 2, "error: --max-condition must be"),
        (["--device", "nonsense"], 2, "error: --device nonsense cannot be used: "),
        (["--device", "meta"], 2, "error: --device meta cannot be used: "),
        (["--count", "0"], 2, "--count"),
        (["--model", "headless"], 3, "has no text encoder"),
    ],
)
def test_command_refuses(command, arguments, code, message):
    result = command(*arguments)
    assert result.exit_code == code and message in result.stderr
    assert result.stderr.count("\n") == 1 or "Usage" in result.stderr


@pytest.mark.parametrize("as_a_folder", [False, True])
def test_command_never_replaces_a_file_unasked(command, tmp_path, as_a_folder):
    file = tmp_path / "covariance.safetensors"
    file.write_bytes(b"mine")
    arguments = ("--count", 200, "--output", tmp_path if as_a_folder else file)
    refused = command(*arguments)
    assert (refused.exit_code, refused.stdout, file.read_bytes()) == (2, "", b"mine")
    assert refused.stderr == f"error: {file} is there already. Choose another --output, or say --overwrite.\n"
    assert command(*arguments, "--overwrite").exit_code == 0
    assert Covariance.load(file).captions == 200


@pytest.mark.filterwarnings("ignore:the covariance of")
def test_command_says_infinity_as_null(command, monkeypatch):
    import perfusion.covariance

    endless = dataclasses.replace(compute_covariance(trained_sd(), ["a"] * 9, progress=False), condition_before=float("inf"))
    monkeypatch.setattr(perfusion.covariance, "get_covariance", lambda *_, **__: endless)
    facts = json.loads(command("--json").stdout, parse_constant=pytest.fail)
    assert facts["condition_before"] is None and facts["captions"] == 9
