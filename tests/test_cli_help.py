"""What `perfusion COMMAND --help` shows at 80 columns: every name in full, and every default."""

import re

import pytest
from typer.testing import CliRunner

from perfusion import cli


def text_of(*arguments):
    result = CliRunner().invoke(cli.app, [*arguments, "--help"], prog_name="perfusion", env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0, result.output
    return result.stdout


def options(name):
    return [each for each in cli._command(name).params if each.param_type_name == "option"]


def entry(text, option):
    """An option's own part of the help, on one line."""
    found = re.search(rf"^  {re.escape(option)}\b.*\n(?:    .*\n)*", text, re.MULTILINE)
    assert found, option
    return " ".join(found[0].split())


def test_every_command_is_described_in_full():
    text = text_of()
    assert max(map(len, text.splitlines())) <= 80
    for name, line in cli.COMMANDS.items():
        assert f"{name} {line}" in " ".join(text.split())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_names_and_defaults_of_every_command(name):
    text = text_of(name)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    for option in options(name):
        for each in (*option.opts, *option.secondary_opts):
            assert re.search(rf"(?<![\w-]){each}(?![\w-])", text), each
        switched_off = option.is_flag and not option.secondary_opts  # a flag's name says what its absence means
        if option.default not in (None, "") and not switched_off:
            assert "[default: " in entry(text, option.opts[0]), option.name


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_exit_codes_are_a_paragraph_of_their_own(name):
    found = re.search(r"\n\n  (Exit codes: .*(?:\n  .*)*)\n\n", text_of(name))
    assert found, name
    assert found[1].startswith("Exit codes: 0 ")
