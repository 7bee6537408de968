"""The demo from end to end, with few steps: what it writes is what it says."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from perfusion import Concept, cli
from perfusion.demo import run_demo
from perfusion.demo.report import duration
from perfusion.demo.run import BIASES, STYLED, TOGETHER
from perfusion.toybox import score
from perfusion.toybox.sheets import weights_digest

pytestmark = pytest.mark.toybox


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Of three steps of training, and four of each picture's 25."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "STEPS", 4)
        return run_demo(tmp_path_factory.mktemp("demo"), steps=3, samples=6, device="cpu")


@pytest.fixture(scope="module")
def folder(result):
    return result.report.parent


def test_the_page_is_one_file_with_every_picture_inside(result):
    page = result.report.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 2 * (5 + 4 + len(STYLED) + len(BIASES)) + 4 * (len(TOGETHER) + 1)
    for data in pictures:
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.size == (128, 128) and len(set(image.convert("L").tobytes())) > 16
    assert len(set(pictures)) == len(pictures)
    assert result.report.stat().st_size < 4_000_000


def test_the_page_shows_concepts_as_text(result):
    page = result.report.read_text()
    assert "&lt;teddy&gt;" in page and "<teddy" not in page
    assert "in 3 steps" not in page and "3 training\nsteps a concept" in page
    assert [duration(seconds) for seconds in (1, 119, 2725)] == ["1 second", "119 seconds", "45 minutes"]


def test_the_overview_shows_references_beside_results(folder):
    with Image.open(folder / "overview.png") as image:
        assert image.width > 8 * 128 and image.height > 3 * 128
    assert (folder / "overview.png").stat().st_size <= 400_000


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["demo", "toybox-classes", "toybox-ten"])
def test_pictures_in_the_docs_were_drawn_with_these_weights(name):
    """`make picture` draws them anew."""
    picture = Path(__file__).parents[2] / f"docs/{name}.png"
    assert picture.stat().st_size <= (400_000 if name == "demo" else 500_000)
    with Image.open(picture) as image:
        assert image.text["toybox"] == weights_digest(), f"{picture} is stale: make picture"


def test_nothing_that_is_there_is_replaced_unasked(folder, tmp_path):
    """The demo's own folder, and one with a caption of somebody's."""
    (tmp_path / "references" / "teapot").mkdir(parents=True)
    (tmp_path / "references" / "teapot" / "teapot-3.txt").write_text("mine")
    for output, named in ((folder, r"report.html, .* and \d\d more"), (tmp_path, r"replace: references/teapot/teapot-3.txt")):
        before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
        with pytest.raises(ValueError, match=f"output: .*{named}. Give another output folder, or say --overwrite"):
            run_demo(output, steps=1, samples=6, device="cpu")
        assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_the_command_refuses_in_one_line(folder):
    result = CliRunner().invoke(cli.app, ["demo", "--output", str(folder)], prog_name="perfusion")
    assert (result.exit_code, result.stdout) == (2, "") and result.stderr.startswith("error: output: ") and result.stderr.count("\n") == 1


def test_the_command_ends_with_two_figures_and_the_path(result, monkeypatch, tmp_path):
    monkeypatch.setattr("perfusion.demo.run_demo", lambda *_, **__: result)
    said = CliRunner().invoke(cli.app, ["demo", "--output", str(tmp_path)], prog_name="perfusion").stdout.splitlines()
    assert [line.split()[0] for line in said[:2]] == [f"{value:.2f}" for value in result.figures.values()]
    assert said[2:] == [f"Open {result.report} in a browser."]


def test_all_that_is_written_is_checked(folder, tmp_path):
    for path in folder.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.name / path.relative_to(folder)
            copy.parent.mkdir(parents=True)
            copy.write_bytes(b"")
            with pytest.raises(ValueError, match=path.name):
                run_demo(tmp_path / path.name, steps=1, samples=6, device="cpu")


def test_the_scores_have_a_row_for_each_comparison(result, folder):
    scores = json.loads((folder / "scores.json").read_text())
    page = result.report.read_text()
    for name in ("teddy", "teapot"):
        rows = scores[name]
        assert list(rows) == [
            f"superclass words, “a {name} …”", f"<{name}>, keys locked", f"<{name}>, keys trained", "other true pictures"
        ]  # fmt: skip
        assert rows["other true pictures"]["identity"] == pytest.approx(1)
        assert rows[f"superclass words, “a {name} …”"]["identity"] == pytest.approx(0)
    for prompt in TOGETHER.values():
        rows = scores[prompt]
        assert rows["other true pictures"]["things"] > 0.8  # six pictures: the judge may miss a thing that hides another
        for which in ("first_identity", "second_identity"):
            assert rows["other true pictures"][which] == pytest.approx(1)
        assert f"{rows['both concepts']['things']:.2f}" in page
    assert result.figures["both concepts seen in one picture"] == scores[TOGETHER["next to"]]["both concepts"]["things"]


def test_no_setting_is_turned_by_hand():
    """Both concepts in one prompt, with default settings."""
    assert all(re.fullmatch(r"a <teddy> (in|next to) a <teapot>", prompt) for prompt in TOGETHER.values())


def test_the_files_are_concepts(folder):
    for name in ("teddy", "teapot"):
        concept = Concept.load(folder / f"{name}.safetensors")
        assert concept.superclass == name and concept.key_outputs is None
        assert f"{(folder / f'{name}.safetensors').stat().st_size:,}" in (folder / "report.html").read_text()


def test_references_have_captions_and_masks(folder):
    pictures = sorted((folder / "references" / "teddy").glob("teddy-?.png"))
    assert len(pictures) == 5
    for picture in pictures:
        assert picture.with_suffix(".txt").read_text().count("*") == 4
        assert picture.with_name(f"{picture.stem}-masklabel.png").exists()
