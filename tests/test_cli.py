"""The command line as a user meets it: help, pictures, the doctor, exit codes, one line per error."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import perfusion
import perfusion_kernels
from perfusion import cli, models
from perfusion.cli import doctor
from perfusion.cli.strict_json import strict_json
from tests.stand_in import save_concept, save_model


def run(*arguments, **environment):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env=environment, prog_name="perfusion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, two concepts for it, and one for another model."""
    folder = tmp_path_factory.mktemp("cli")
    save_model(folder / "model")
    save_concept(folder / "my-teddy.safetensors", "teddy", seed=1)
    save_concept(folder / "my-cup.safetensors", "cup", seed=2)
    save_concept(folder / "foreign.safetensors", "teddy", width=24)
    return folder


@pytest.fixture
def draw(folder, tmp_path):
    """`perfusion generate` with the small model, two steps, and --output in a fresh folder."""

    def draw(*arguments, output=tmp_path / "out.png", model=folder / "model"):
        return run("generate", *arguments, "--model", model, "--output", output, "--steps", 2)

    return draw


# help


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for name in cli.COMMANDS:
        assert re.search(rf"^\W*{name}\s", result.stdout, re.MULTILINE), name
    assert run().output.strip() == result.stdout.strip()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command(name):
    result = run(name, "--help")
    assert result.exit_code == 0, result.output
    assert f"perfusion {name} [OPTIONS]" in result.stdout and "--help" in result.stdout


def test_help_is_light():
    """It imports nothing heavy, so it comes at once."""
    code = "import sys; from perfusion.cli import app; app(['--help'], standalone_mode=False); print(*sys.modules)"
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.splitlines()[-1].split())
    assert "perfusion.cli" in loaded and not {"torch", "numpy", "diffusers", "transformers", "PIL"} & loaded


def test_version():
    assert run("--version").stdout == f"perfusion {perfusion.__version__}\n"


def test_unknown_command_is_a_usage_error():
    result = run("generat")
    assert result.exit_code == 2 and "Did you mean 'generate'?" in result.stderr


# generate


def test_generate_writes_one_picture_that_says_how_it_was_made(draw, folder, tmp_path):
    result = draw("a <my-teddy> on the béach", "--concept", folder / "my-teddy.safetensors", "--seed", 7)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Wrote {tmp_path / 'out.png'}.\n"
    assert os.listdir(tmp_path) == ["out.png"]
    text = Image.open(tmp_path / "out.png").text
    assert (text["prompt"], text["seed"]) == ("a <my-teddy> on the béach", "7")
    facts = json.loads(text["perfusion"])
    assert facts == {
        "version": perfusion.__version__,
        "model": "model",
        "steps": 2,
        "guidance_scale": 6.0,
        "negative_prompt": "",
        "concepts": {
            "my-teddy": {
                "file": "my-teddy.safetensors", "superclass": "teddy", "strength": 1.0, "bias": 0.7, "temperature": 0.15,
            }
        },
    }  # fmt: skip


def test_generate_writes_a_sheet_and_numbered_pictures(draw, folder, tmp_path):
    concepts = ("--concept", folder / "my-teddy.safetensors", "--concept", f"pot={folder / 'my-cup.safetensors'}")
    prompts = ("a <my-teddy> in a <pot>", "a <pot:0.5>", "a <perfusion:my-teddy:0.5> in a <pot|bias=0.6>")
    result = draw(*prompts, *concepts, "--count", 2, "--batch-size", 4, "--seed", 3, "--bias", 0.5, "--strength", "pot=0.9", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["sheet"] == str(tmp_path / "out.png")
    assert [(each["prompt"], each["seed"]) for each in facts["pictures"]] == [(p, seed) for p in prompts for seed in (3, 4)]
    assert [each["file"] for each in facts["pictures"]] == [str(tmp_path / f"out-{n}.png") for n in range(1, 7)]
    assert [(c["bias"], c["strength"]) for c in facts["concepts"].values()] == [(0.5, 1.0), (0.5, 0.9)]
    sheet = Image.open(tmp_path / "out.png")
    assert sheet.height > 1.4 * sheet.width  # three rows, two columns
    assert sheet.text["prompt"].splitlines() == list(prompts)
    assert Image.open(tmp_path / "out-5.png").text["seed"] == "3"


def test_generate_repeats_itself_and_heeds_the_settings(draw, folder, tmp_path):
    def picture(*arguments, prompt="a <my-teddy>"):
        result = draw(prompt, "--concept", folder / "my-teddy.safetensors", "--overwrite", *arguments)
        assert result.exit_code == 0, result.output
        return Image.open(tmp_path / "out.png").tobytes()

    first = picture()
    assert picture() == first
    different = [
        picture("--seed", 1),
        picture("--strength", 0),
        picture("--bias", "my-teddy=1.5"),
        picture("--temperature", 1),
        picture("--guidance-scale", 1),
        picture("--negative-prompt", "night"),
    ]
    assert len({first, *different}) == 7
    assert picture(prompt="a <my-teddy:0>") == different[1]


def test_generate_never_replaces_a_picture_unasked(draw, folder, tmp_path):
    (tmp_path / "out-2.png").write_bytes(b"mine")
    refused = draw("a cup", "--count", 2)
    assert refused.exit_code == 2 and "out-2.png is there already" in refused.stderr and "--overwrite" in refused.stderr
    assert (tmp_path / "out-2.png").read_bytes() == b"mine" and os.listdir(tmp_path) == ["out-2.png"]
    assert draw("a cup", "--count", 2, "--overwrite").exit_code == 0
    assert len(os.listdir(tmp_path)) == 3


def test_generate_makes_the_folder_and_needs_no_concept(draw, tmp_path):
    assert draw("a cup", output=tmp_path / "new" / "a.png").exit_code == 0
    assert (tmp_path / "new" / "a.png").exists()


UNUSABLE = ("nan", "inf", "1e30", "-1")


def test_generate_says_what_is_wrong(draw, folder, tmp_path):
    teddy = ("--concept", folder / "my-teddy.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((folder / "my-teddy.safetensors").read_bytes()[:-1])
    for result, code, text in (
        (draw("a cup", output=tmp_path / "a.jpg"), 2, "--output must be NAME.png, got "),
        (draw("a <my-cup>", *teddy), 2, "no concept <my-cup> is loaded; loaded are: <my-teddy>. Give its file with --concept FILE."),
        (draw("a cup", "--negative-prompt", "<x>"), 2, "loaded are: none"),
        (draw("a cup", *teddy, "--bias", "high"), 2, "--bias must be a number or NAME=NUMBER, got 'high'"),
        (draw("a cup", *teddy, "--bias", "cup=1"), 2, "--bias: there is no concept cup; loaded are: my-teddy"),
        (draw("a cup", "--bias", "1"), 2, "--bias: there is no concept to set"),
        (draw("a cup", *teddy, "--strength", "9"), 2, "strength must"),
        (draw("a cup", *teddy, *teddy), 2, "is loaded already. Give this one another name with --concept NAME=FILE."),
        (draw("a <my-teddy> and a <twin>", *teddy, "--concept", f"twin={teddy[1]}"), 2, "error: 'my-teddy', 'twin' cannot share a prompt"),
        (draw("a <my-teddy> and a <twin>", *teddy, "--concept", f"twin={teddy[1]}"), 2, "Write only one of them in a prompt."),
        (draw("a cup", "--concept", "none.safetensors"), 2, "none.safetensors: No such file"),
        (draw("a cup", "--concept", tmp_path / "torn.safetensors"), 3, "cut short"),
        (draw("a cup", "--concept", folder / "foreign.safetensors"), 2, "cannot be used with this pipeline"),
        (draw("a cup", model=folder), 2, "has no model_index.json"),
        (draw("a cup", "--device", "nonsense"), 2, "--device nonsense cannot be used"),
        (draw("a cup", output=".png"), 2, "--output must be NAME.png, got .png"),
        (draw("a cup", output=""), 2, "--output must be NAME.png, got no name"),
        *((draw("a cup", "--guidance-scale", scale), 2, "--guidance-scale must be a number from 0 to 100, got") for scale in UNUSABLE),
    ):
        assert result.exit_code == code, result.output
        assert text in result.stderr.splitlines()[-1] and not result.stdout, result.output
        assert result.stderr.splitlines()[-1].startswith("error: ")
    assert draw("a cup", "--count", 0).exit_code == 2
    beyond = draw("a cup", "--seed", 10**23)
    assert beyond.exit_code == 2 and "'--seed'" in beyond.stderr and "9223372036854775807" in beyond.stderr
    assert os.listdir(tmp_path) == ["torn.safetensors"]


def test_generate_checks_every_prompt_before_it_draws(draw, folder, tmp_path):
    teddy = ("--concept", folder / "my-teddy.safetensors", "--batch-size", 1)
    for prompt, text in (
        ("a <my-teddy:0.4> <my-teddy>", "prompt 'a <my-teddy:0.4> <my-teddy>': <my-teddy> is named twice in one prompt with different"),
        ("a teddy " * 40 + "<my-teddy>", "lies beyond the 77 tokens"),
    ):
        result = draw("a <my-teddy>", prompt, *teddy)
        assert (result.exit_code, result.stdout, os.listdir(tmp_path)) == (2, "", []) and text in result.stderr, result.output


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_generate_finds_a_folder_that_cannot_be_written_before_it_loads_a_model(draw, tmp_path, name):
    (tmp_path / "file").write_text("")
    result = draw("a cup", output=tmp_path / name / "out.png", model="not even looked for")
    assert result.exit_code == 2 and "/file is a file, and a folder is needed there. Choose another path" in result.stderr


def test_generate_does_not_take_a_folder_for_a_picture(draw, tmp_path):
    (tmp_path / "out.png").mkdir()
    result = draw("a cup", "--overwrite")
    assert result.exit_code == 2 and "out.png is a folder" in result.stderr


def test_generate_warns_about_what_is_no_concept(draw, folder):
    concepts = ("--concept", folder / "my-teddy.safetensors", "--concept", folder / "my-cup.safetensors")
    result = draw("a <my-teddy bear>", *concepts)
    assert result.exit_code == 0
    warned = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 2 and "'<my-teddy bear>' is drawn as plain text" in warned[0] and "no prompt names <my-cup>" in warned[1]
    assert "warning" not in draw("i <3 a <my-teddy> in a <my-cup>", *concepts, "--overwrite").stderr


def test_ctrl_c_says_which_pictures_are_finished(draw, tmp_path, monkeypatch):
    class Generator(torch.Generator):  # one for each picture
        def manual_seed(self, seed):
            if seed == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().manual_seed(seed)

    monkeypatch.setattr(torch, "Generator", Generator)
    result = draw("a cup", "--count", 4, "--batch-size", 1)
    assert result.exit_code == 130 and sorted(os.listdir(tmp_path)) == ["out-1.png", "out-2.png"]
    assert f"Stopped after 2 of 4 pictures: {tmp_path / 'out-1.png'} to out-2.png are finished, the contact sheet is not made." in result.stderr
    assert result.stderr.endswith("interrupted\n")


def test_float16_on_a_cpu_is_one_line_of_advice(draw, caplog):
    result = draw("a cup", "--dtype", "float16", "--device", "cpu")
    assert result.exit_code == 0 and "Pipelines loaded" not in result.stderr + caplog.text
    assert result.stderr.count("warning: float16 on a CPU is slow") == 1


def test_generate_with_the_built_in_model(tmp_path):
    result = run("generate", "a red teddy on the beach", "--output", tmp_path / "out.png", "--steps", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "out.png").size == (128, 128)


# errors


@pytest.mark.parametrize("command", ["demo", "train", "generate", "covariance", "convert"])
def test_a_file_where_a_folder_is_needed_is_named(command, folder, tmp_path, monkeypatch):
    """One sentence for every command: it is made of the file system's error alone."""
    file = tmp_path / "q1.png"
    file.write_bytes(b"mine")
    monkeypatch.setattr("perfusion.demo.run_demo", lambda output, **_: output.mkdir(exist_ok=True))
    monkeypatch.setattr("perfusion.training.train", lambda *_, output, **__: output.mkdir(parents=True, exist_ok=True))
    model = ("--model", folder / "model", "--device", "cpu")
    result = run(
        *{
            "demo": ("demo", "--output", file),
            "train": ("train", tmp_path, "--superclass", "teddy", "--name", "x", "--output", file / "a" / "b", *model),
            "generate": ("generate", "a cup", "--steps", 1, "--output", file / "x.png", *model),
            "covariance": ("covariance", "--count", 50, "--output", file / "x", *model),
            "convert": ("convert", file / "x", "--name", "x", "--model", folder / "model"),
        }[command]
    )
    told = f"error: {file} is a file, and a folder is needed there. Choose another path, or move that file away."
    assert (result.exit_code, result.stderr.splitlines()[-1], file.read_bytes()) == (2, told, b"mine")


def fail_with(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(models, "load_pipeline", fail)


def test_an_unexpected_error_is_one_line_and_debug_shows_it_all(draw, monkeypatch):
    fail_with(TypeError("two\nlines"), monkeypatch)
    result = draw("a cup")
    assert result.exit_code == 1
    assert result.stderr == "error: TypeError: two lines (unexpected; `perfusion --debug ...` shows where)\n"
    assert isinstance(run("--debug", "generate", "a cup").exception, TypeError)
    assert isinstance(run("generate", "a cup", PERFUSION_DEBUG="1").exception, TypeError)


def test_an_error_of_the_file_system_names_the_file(draw, monkeypatch):
    fail_with(PermissionError(13, "Permission denied", "/a/b"), monkeypatch)
    result = draw("a cup")
    assert (result.exit_code, result.stderr) == (2, "error: /a/b: Permission denied\n")


def test_a_warning_is_one_line(draw, folder, monkeypatch):
    load = models.load_pipeline

    def warn(*arguments, **options):
        import warnings

        warnings.warn("mind the gap", stacklevel=2)
        return load(*arguments, **options)

    monkeypatch.setattr(models, "load_pipeline", warn)
    result = draw("a cup")
    assert result.exit_code == 0 and "warning: mind the gap\n" in result.stderr


def test_ctrl_c_ends_in_one_line(draw, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    result = draw("a cup")
    assert (result.exit_code, result.stderr, os.listdir(tmp_path)) == (130, "interrupted\n", [])


@pytest.mark.parametrize("command", ["demo", "train", "generate", "covariance", "warmup"])
@pytest.mark.parametrize("device", ["nonsense", "cpu:x"])
def test_a_device_that_is_none_is_a_usage_error(command, device, tmp_path):
    needed = {"generate": ("a cup",), "train": (tmp_path, "--superclass", "teddy", "--name", "x")}.get(command, ())
    result = run(command, *needed, "--device", device)
    assert result.exit_code == 2 and result.stderr.startswith(f"error: --device {device} cannot be used: "), result.output
    assert result.stderr.count("\n") == 1


# JSON


def test_what_json_cannot_say_is_null():
    value = {"a": [1.5, float("inf"), (float("nan"), "é", None, True)], 2: -float("inf")}
    assert strict_json(value) == '{"a": [1.5, null, [null, "é", null, true]], "2": null}'


def test_every_command_writes_its_json_so():
    for path in Path(cli.__file__).parent.glob("*.py"):
        assert path.name == "strict_json.py" or "dumps" not in path.read_text(encoding="utf-8"), path


# doctor


@pytest.fixture
def healthy(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "TOYBOX", folder / "model")
    monkeypatch.setenv("PERFUSION_CACHE", str(tmp_path))


def test_doctor_finds_all_well(healthy, tmp_path):
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("\nAll is well.\n")
    for line in (
        rf"ok  software  perfusion +{re.escape(perfusion.__version__)}, ",
        rf"ok  software  torch +{re.escape(metadata.version('torch'))}",
        r"ok  device    cpu +\d+ cores",
        r"ok  backend   reference +concept_gates, ",
        r"ok  operator  fused_edited_attention +reference on \w+: largest error \d",
        r"ok  model     toybox +loads; ",
        rf"ok  cache     covariance +{re.escape(str(tmp_path))}/covariance, 0 files",
    ):
        assert re.search(rf"^{line}", result.stdout, re.MULTILINE), line


def test_doctor_tells_programs(healthy):
    report = json.loads(run("doctor", "--json").stdout, parse_constant=pytest.fail)
    assert report["healthy"] and {finding["state"] for finding in report["findings"]} <= {"ok", "off"}
    assert {"software", "compiler", "device", "backend", "compiled", "operator", "model", "cache"} == {f["area"] for f in report["findings"]}


def test_doctor_says_why_it_cannot_list_the_compiled_kernels(healthy, monkeypatch):
    """Which is the library's matter: the doctor goes on."""
    compiled = {"architectures": ["sm_80"], "cuda": "13.0", "torch": "2.13", "reason": "the library does not load: libcudart"}
    monkeypatch.setattr(perfusion_kernels, "compiled_kernels", lambda: compiled)
    report = json.loads(run("doctor", "--json").stdout)
    found = [(finding["state"], finding["detail"]) for finding in report["findings"] if finding["area"] == "compiled"]
    assert found == [("off", compiled["reason"])]
    assert report["healthy"] and report["compiled_kernels"] == compiled


def test_doctor_says_an_operators_name_once(monkeypatch):
    def unavailable(name, *_):
        raise perfusion_kernels.BackendUnavailable(f"{name}: kernels need a GPU")

    monkeypatch.setattr(doctor, "_run", unavailable)
    assert {finding.detail for finding in doctor._operators(torch.device("cpu"))} == {"kernels need a GPU"}


def test_doctor_says_what_is_broken(healthy, monkeypatch, tmp_path):
    exact = perfusion_kernels.concept_gates

    @functools.wraps(exact)
    def broken(*arguments, **options):
        return tuple(each * float("nan") for each in exact(*arguments, **options))

    monkeypatch.setattr(perfusion_kernels, "concept_gates", broken)
    monkeypatch.setattr(models, "TOYBOX", tmp_path / "none")
    monkeypatch.setattr(doctor, "REQUIRED", (*doctor.REQUIRED, "no-such-package"))
    monkeypatch.setattr(doctor, "OLDEST_TORCH", (99, 0))
    result = run("doctor")
    assert result.exit_code == 1
    bad = [line.split()[2] for line in result.stdout.splitlines() if line.startswith("bad ")]
    assert bad[:2] == ["torch", "no-such-package"] and "concept_gates" in bad and bad[-1] == "toybox"
    assert f"{len(bad)} of these must be repaired." in result.stdout


def test_the_built_in_model_is_well(monkeypatch):
    findings = list(doctor._toybox())
    assert [finding.state for finding in findings] == ["ok"], findings
