"""The demo from end to end, with few steps: what it writes is what it says."""

import re

import pytest
from PIL import Image
from typer.testing import CliRunner

from perfusion import Concept, cli
from perfusion.demo import run_demo
from perfusion.demo.report import duration


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, steps=3, samples=6, device="cpu")
    return folder


def test_every_picture_of_the_report_is_there(folder):
    report = (folder / "report.md").read_text()
    names = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", report)
    assert len(names) == 2 + 2 * 3
    for name in names:
        with Image.open(folder / name) as image:
            assert image.width >= 256
        assert f'src="{name}"' in (folder / "report.html").read_text()


def test_the_page_shows_concepts_as_text(folder):
    page = (folder / "report.html").read_text()
    assert "&lt;teddy&gt;" in page or "&lt;teddy>" in page
    assert "<table>" in page and "<teddy>" not in page


def test_the_report_writes_concepts_as_code_and_numbers_as_words(folder):
    report = (folder / "report.md").read_text()
    assert "<teddy>" in report and "<" not in re.sub("`[^`\n]*`", "", report)  # outside code it would be a tag
    assert report.endswith("|\n") and "3 steps, " in report
    assert [duration(seconds) for seconds in (1, 119, 2725)] == ["1 second", "119 seconds", "45 minutes"]


def test_nothing_that_is_there_is_replaced_unasked(folder, tmp_path):
    """The demo's own folder, and one with a caption of somebody's."""
    (tmp_path / "references" / "teapot").mkdir(parents=True)
    (tmp_path / "references" / "teapot" / "teapot-3.txt").write_text("mine")
    for output, named in ((folder, r"report.md, .* and \d\d more"), (tmp_path, r"replace: references/teapot/teapot-3.txt")):
        before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
        with pytest.raises(ValueError, match=f"output: .*{named}. Give another output folder, or say --overwrite"):
            run_demo(output, steps=1, samples=6, device="cpu")
        assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_the_command_refuses_in_one_line(folder):
    result = CliRunner().invoke(cli.app, ["demo", "--output", str(folder)], prog_name="perfusion")
    assert (result.exit_code, result.stdout) == (2, "") and result.stderr.startswith("error: output: ") and result.stderr.count("\n") == 1


def test_all_that_is_written_is_checked(folder, tmp_path):
    for path in folder.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.name / path.relative_to(folder)
            copy.parent.mkdir(parents=True)
            copy.write_bytes(b"")
            with pytest.raises(ValueError, match=path.name):
                run_demo(tmp_path / path.name, steps=1, samples=6, device="cpu")


def test_the_tables_have_a_row_for_each_comparison(folder):
    rows = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| ")]
    for start in ("| superclass prompt", "| `<teddy>`, keys locked", "| `<teddy>`, keys trained", "| `<teapot>`, keys locked", "| other true"):
        assert any(row.startswith(start) for row in rows), start
    true = [row for row in rows if row.startswith("| other true")]
    assert all("| 1.00 |" in row for row in true)


def test_both_in_one_image_are_scored(folder):
    report = (folder / "report.md").read_text()
    for relation in ("in", "next to"):
        assert f"> {relation} a <teapot|" in report
        rows = report.split(f"| superclass prompt, “a teddy {relation} a teapot …” |")[1].splitlines()
        assert rows[0].endswith("| 0.00 |") and rows[1].startswith(f"| both concepts, {relation} |")
        things, *_, identity = map(float, rows[2].removeprefix("| other true pictures |").rstrip("|").split("|"))
        assert things > 0.8 and identity == 1  # six pictures: the judge may miss a thing that hides another


def test_the_files_are_concepts(folder):
    for name in ("teddy", "teapot"):
        concept = Concept.load(folder / f"{name}.safetensors")
        assert concept.superclass == name and concept.key_outputs is None
        assert f"{(folder / f'{name}.safetensors').stat().st_size:,}" in (folder / "report.md").read_text()


def test_references_have_captions_and_masks(folder):
    pictures = sorted((folder / "references" / "teddy").glob("teddy-?.png"))
    assert len(pictures) == 5
    for picture in pictures:
        assert picture.with_suffix(".txt").read_text().count("*") == 4
        assert picture.with_name(f"{picture.stem}-masklabel.png").exists()
