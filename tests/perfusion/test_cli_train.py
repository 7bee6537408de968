"""`perfusion train` as a user meets it."""

import json
import os
import signal
import sys

import pytest
from transformers.utils import logging
from typer.testing import CliRunner

from perfusion import cli
from perfusion.concept import Concept
from perfusion.training import checkpoints
from perfusion.training.session import TrainingSession
from tests.perfusion.learning import covariance_of, rows, same, train_module, write_pictures
from tests.perfusion.tiny import tiny_sd
from tests.stand_in import save_model

SHORT = ("--steps", 3, "--batch-size", 2, "--validation-every", 0, "--checkpoint-every", 2, "--no-tensorboard")
WHAT = ("--superclass", "teddy", "--name", "mine")


@pytest.fixture(scope="module", autouse=True)
def _no_bars():
    """`cli.main` says so in the environment, before transformers is imported."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    save_model(folder / "model")
    covariance_of(tiny_sd()).save(folder / "covariance.safetensors")
    write_pictures(folder / "pictures")
    return folder


@pytest.fixture
def learn(folder, monkeypatch):
    monkeypatch.setattr(train_module, "VALIDATION_STEPS", 1)

    usual = ("--model", folder / "model", "--covariance", folder / "covariance.safetensors", "--device", "cpu")

    def learn(*arguments):  # of an option given twice, the last one counts
        arguments = ("train", folder / "pictures", *usual, *arguments)
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="perfusion")

    return learn


def test_help_names_what_users_know():
    result = CliRunner().invoke(cli.app, ["train", "--help"], prog_name="perfusion", env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for option in (
        "--superclass",
        "--initializer-token",
        "--name",
        "--resume-from-checkpoint",
        "--checkpointing-steps",
        "--gradient-checkpointing",
        "--json",
        "-masklabel.png",
        "alpha channel",
        "--overwrite",
    ):
        assert option.replace(" ", "") in "".join(result.stdout.split()), option


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "error: --superclass and --name must be given: what the thing is, and what prompts will call it.\n"),
        (("--name", "mine"), 2, "error: --superclass must be given: what the thing is.\n"),
        ((*WHAT, "--steps", 0), 2, "error: training: steps must be at least 1, got 0\n"),
        ((*WHAT, "--name", "../mine"), 2, "error: a concept's name must be 1 to 32 characters"),
        ((*WHAT, "--device", "abacus"), 2, "error: --device abacus cannot be used"),
        (("--superclass", "zyx" * 6, "--name", "mine"), 2, "error: superclass 'zyxzyxzyxzyxzyxzyx' is 18 tokens long"),
        ((*WHAT, "--resume", "latest"), 2, "error: there is no checkpoint to continue from"),
        ((*WHAT, "--config", "/nowhere.yaml"), 2, "error: /nowhere.yaml: No such file or directory. Check the path.\n"),
    ],
)
def test_errors_are_one_line(learn, tmp_path, arguments, code, message):
    result = learn("--output", tmp_path / "out", *arguments)
    assert result.exit_code == code and result.stderr.startswith(message) and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_replaced_with_overwrite_only(learn, tmp_path):
    (tmp_path / "gallery.png").write_bytes(b"mine")
    result = learn(*WHAT, *SHORT, "--output", tmp_path, "--model", "not even looked for")
    assert result.exit_code == 2 and result.stderr.startswith("error: output: ") and "replace: gallery.png. Give" in result.stderr
    assert os.listdir(tmp_path) == ["gallery.png"] and (tmp_path / "gallery.png").read_bytes() == b"mine"
    result = learn(*WHAT, *SHORT, "--steps", 1, "--output", tmp_path, "--overwrite")
    assert result.exit_code == 0 and (tmp_path / "gallery.png").read_bytes() != b"mine", result.stderr


def test_json_and_what_the_settings_in_the_folder_repeat(learn, tmp_path):
    result = learn(
        *WHAT,
        *SHORT,
        "--instance-prompt",
        "a {}",
        "--instance-prompt",
        "a photo of a {}",
        "--seed",
        5,
        "--output",
        tmp_path / "one",
        "--json",
    )
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    file = tmp_path / "one" / "mine.safetensors"
    assert told["file"] == str(file) and told["bytes"] == file.stat().st_size and told["recipe"]["seed"] == 5

    result = learn("--config", tmp_path / "one" / "config.yaml", "--output", tmp_path / "two")
    assert result.exit_code == 0, result.stderr
    assert f"Wrote {tmp_path / 'two' / 'mine.safetensors'}" in result.stdout
    assert same(Concept.load(file), Concept.load(tmp_path / "two" / "mine.safetensors"))
    assert (tmp_path / "one" / "config.yaml").read_bytes() == (tmp_path / "two" / "config.yaml").read_bytes()

    result = learn("--config", tmp_path / "one" / "config.yaml", "--seed", 6, "--output", tmp_path / "three", "--json")
    assert json.loads(result.stdout)["recipe"]["seed"] == 6  # options go before the file


def test_the_bar_says_what_is_drawn_and_the_last_lines_what_was_written(learn, tmp_path):
    result = learn(*WHAT, *SHORT, "--validation-every", 2, "--output", tmp_path / "out")
    assert result.exit_code == 0 and "<mine>, drawing validation pictures" in result.stderr and "<mine>, drawing the gallery" in result.stderr
    assert "README.md, gallery.png, references.png, config.yaml, log.jsonl, validation/, checkpoints/.\n" in result.stdout


def test_curves_without_tensorboard_are_said_to_be_missing(learn, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = learn(*WHAT, *SHORT, "--steps", 1, "--output", tmp_path / "out", "--tensorboard")
    told = [line for line in result.stderr.splitlines() if "tensorboard" in line]
    assert result.exit_code == 0 and len(told) == 1 and told[0].startswith("warning: ") and "pip install tensorboard" in told[0]


def test_ctrl_c_keeps_a_checkpoint_and_latest_goes_on(learn, tmp_path, monkeypatch):
    whole = learn(*WHAT, *SHORT, "--output", tmp_path / "whole")
    assert whole.exit_code == 0, whole.stderr
    step = TrainingSession.train_step

    def interrupted(session):
        if session.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(session)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingSession, "train_step", interrupted)
        result = learn(*WHAT, *SHORT, "--output", tmp_path / "parts")
    kept = checkpoints.latest(tmp_path / "parts" / "checkpoints")
    assert result.exit_code == 130 and kept.name == "step-000001.safetensors"
    assert f"Stopped at step 1; {kept} keeps it. Continue with --resume latest." in result.stderr and result.stderr.endswith(
        "interrupted\n"
    )

    # the settings are already in the folder
    result = learn("--config", tmp_path / "parts" / "config.yaml", "--output", tmp_path / "parts", "--resume", "latest")
    assert result.exit_code == 0, result.stderr
    assert same(Concept.load(tmp_path / "parts" / "mine.safetensors"), Concept.load(tmp_path / "whole" / "mine.safetensors"))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    result = learn("--config", tmp_path / "parts" / "config.yaml", "--output", tmp_path / "parts", "--resume", "latest")
    assert result.exit_code == 2 and result.stderr.startswith("error: nothing is left to do")
