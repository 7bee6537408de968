"""What messages advise exists; what is printed to be typed can be typed; consoles, homes and signals."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from perfusion import cli
from perfusion.cli import _command
from perfusion.termination import Terminated

SOURCES = sorted(Path(cli.__file__).parents[1].rglob("*.py"))
OTHERS = {"--operators", "--work", "--output"}  # options of python -m perfusion.toybox.…


def options(name):
    return {text for option in _command(name).params for text in (*option.opts, *option.secondary_opts) if text.startswith("--")}


def strings(path):
    """Texts of a file that a user may read: no docstrings of modules and functions that are not commands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {id(node.body[0].value) for node in ast.walk(tree) if hasattr(node, "body") and isinstance(node.body, list)
                     and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation]


def test_options_that_messages_name_exist():
    every = set().union(*(options(name) for name in cli.COMMANDS)) | {"--version", "--debug", "--help"}
    for path in SOURCES:
        if "toybox" in path.parts:
            continue
        named = {found for text in strings(path) for found in re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z]", text)}
        command = path.stem if path.parent.name == "cli" and path.stem in cli.COMMANDS else None
        if "training" in path.parts:
            command = "train"
        known = every if command is None else options(command) | {"--version", "--debug", "--help"}
        wrong = {each for each in named if each not in known and each not in OTHERS}
        other = {each for each in wrong if each in every and path.parent.name == "cli"}  # an example of another command
        assert not wrong - other, (path, wrong)


def test_a_signal_has_its_own_exit_code(monkeypatch):
    def end(*_, **__):
        raise Terminated(15)

    monkeypatch.setattr("perfusion.demo.run_demo", end)
    result = CliRunner().invoke(cli.app, ["demo", "--output", "x"], prog_name="perfusion")
    assert (result.exit_code, result.stderr) == (143, "ended by SIGTERM\n")


def test_a_console_that_cannot_write_a_name_does_not_fail_the_work():
    code = "import sys; sys.stdout.reconfigure(encoding='cp1252'); from perfusion.cli import _forgiving_console; _forgiving_console(); print('泰迪.png')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert ran.returncode == 0 and ran.stdout.strip() == rb"\u6cf0\u8fea.png", ran.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_there(name):
    assert isinstance(_command(name), typer.core.TyperCommand)
