"""The commands `perfusion serve` and `perfusion keys`; what a server is told is tested with the server."""

import importlib.util
import json

import pytest
from sqlalchemy import create_engine, text
from typer.testing import CliRunner

from perfusion import cli
from perfusion.cli.serve import named_models
from perfusion.serve.keys import Keys

pytestmark = pytest.mark.serve


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="perfusion")


def test_the_life_of_a_key(tmp_path):
    made = run("keys", "alice", "--scope", "draw", "--scope", "upload", "--folder", tmp_path)
    key = made.stdout.strip()
    assert made.exit_code == 0 and key.startswith("pk-") and len(key) > 40
    assert json.loads(run("keys", "--folder", tmp_path, "--json").stdout)["keys"][0]["scopes"] == ["draw", "upload"]
    known = Keys(create_engine(f"sqlite:///{tmp_path / 'state.sqlite'}"))
    assert known.find(key).name == "alice" and known.find(key + "x") is None and known.find("\udcff") is None
    for wrong, message in (
        (("alice",), "there is a key named 'alice' already"), (("A b",), "1 to 32 characters"), (("bob", "--scope", "all"), "some of draw, "),
        (("--revoke",), "needs the NAME"), (("bob", "--revoke"), "no key named 'bob'"),
    ):  # fmt: skip
        refused = run("keys", *wrong, "--folder", tmp_path)
        assert refused.exit_code == 2 and message in refused.stderr, refused.output
    assert run("keys", "alice", "--revoke", "--folder", tmp_path).exit_code == 0
    assert known.find(key) is None and not known.any()


def test_the_database_keeps_what_was_committed(tmp_path):
    run("keys", "alice", "--folder", tmp_path)
    with create_engine(f"sqlite:///{tmp_path / 'state.sqlite'}").connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"


@pytest.mark.parametrize("command", ["serve", "keys"])
def test_a_missing_extra_is_named(command, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sqlalchemy" else find(name))
    refused = run(command)
    assert refused.exit_code == 2 and "(sqlalchemy): pip install 'perfusion-kernels[serve]'" in refused.stderr


def test_models_have_names(tmp_path, world):
    folder = world / "model"
    assert named_models([f"one={folder}", str(folder)]) == {"one": str(folder), "model": str(folder)}
    with pytest.raises(ValueError, match="two models are named 'model'"):
        named_models([str(folder), f"model={folder}"])
    refused = run("serve", "--model", tmp_path / "nothing")
    assert refused.exit_code == 2 and "neither a folder nor a file" in refused.stderr


def test_other_addresses_need_a_key(tmp_path, world):
    refused = run("serve", "--model", world / "model", "--host", "0.0.0.0", "--folder", tmp_path / "state")
    assert refused.exit_code == 2 and "perfusion keys NAME --scope admin" in refused.stderr
