"""The demo from end to end, with few steps: what it writes is what it says."""

import re

import pytest
from PIL import Image

from perfusion import Concept
from perfusion.demo import run_demo


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


def test_the_tables_have_a_row_for_each_comparison(folder):
    rows = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| ")]
    for start in ("| superclass prompt", "| <teddy>, keys locked", "| <teddy>, keys trained", "| <teapot>, keys locked", "| other true"):
        assert any(row.startswith(start) for row in rows), start
    true = [row for row in rows if row.startswith("| other true")]
    assert all("| 1.00 |" in row for row in true)


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
