"""bench/choices.py: the shipped table and its page come from rows of GPUs that passed their gate, and from nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.choices import PAGE, PLACE, decided, refreshed, table
from perfusion_kernels import choices

ROOT = Path(__file__).parents[2]
PROJECTION = {"B": 2, "T": 77, "D": 768, "O": 12480}
LAYER = {"B": 2, "N": 64, "C": 1280, "T": 77, "H": 8, "d": 160}


def rows(suite, shapes, times, device="NVIDIA H200", **changes):
    """One row per contestant; a time that is a text says why there is none."""
    common = {
        "suite": suite, "case": "a case", "dtype": "bfloat16", "shapes": shapes, "device": device, "quick": False, "torch": "2.13.0",
        "commit": "0123456789ab", "date": "2026-01-02T03:04:05+00:00", **changes,
    }  # fmt: skip
    timed = {name: time for name, time in times.items() if not isinstance(time, str)}
    for name, time in times.items():
        if name in timed:
            ratios = {other: [0.0, time / its, 9.0] for other, its in timed.items() if other != name}
            yield {**common, "provider": name, "gate": "passed", "ratios": ratios, "repeats": 30}
        else:
            yield {**common, "provider": name, "gate": "not passed", "reason": time}


def projection(J=1, **times):
    return rows("projection", {**PROJECTION, "J": J}, {"cuda": 1.0, "triton": 2.0, "reference": 0.1, "expert": 2.5, **times})


def outcome(found):
    (only,) = decided(found).values()
    return only if isinstance(only, str) else (only.choice, only.ratio, only.against)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({}, ("cuda", 0.5, "triton")),
        ({"expert": 1.6}, ("cuda", 0.625, "expert")),
        ({"expert": 0.8}, ("library", 1.25, "expert")),
        ({"triton": 0.8}, ("library", 1.25, "triton")),
        ({"cuda": 1.96}, ("library", 0.98, "triton")),
        ({"triton": "no Triton", "reference": 1.25}, ("cuda", 0.8, "reference")),
        ({"cuda": "its result is wrong"}, "cuda: its result is wrong"),
        ({"expert": "it raised"}, "expert: it raised"),
    ],
)
def test_the_product_must_beat_the_expert_and_what_runs_by_default(times, expected):
    assert outcome(list(projection(**times))) == expected


def test_it_must_with_every_number_of_concepts():
    found = [*projection(J=1), *projection(J=3, triton=1.0)]
    assert outcome(found) == outcome(found[::-1]) == ("library", 1.0, "triton")
    assert outcome([*projection(J=1), *projection(J=3, cuda="its result is wrong")]) == "cuda: its result is wrong"


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"cuda": 2.0, "cuda absorbed": 1.0, "triton": 0.1, "triton absorbed": 0.1}, ("absorbed", 0.5, "cuda")),
        ({"cuda": 1.0, "cuda absorbed": 2.0, "triton": 1.0, "triton absorbed": 0.1}, ("plain", 2.0, "cuda")),
        ({"cuda": "not here", "cuda absorbed": "not here", "triton": 1.0, "triton absorbed": 0.8}, ("absorbed", 0.8, "triton")),
        ({"cuda": "d = 48", "cuda absorbed": 1.0, "triton": 4.0, "triton absorbed": 0.1}, ("absorbed", 0.25, "triton")),
        ({"reference": 1.0, "reference absorbed": "wrong"}, "reference absorbed: wrong"),
    ],
)
def test_a_layer_is_compared_on_the_backends_that_run_by_default(times, expected):
    assert outcome(list(rows("layer", LAYER, times))) == expected


def test_what_was_measured_last_counts_and_other_suites_do_not():
    found = [*projection(), *projection(expert=0.5), *rows("overhead", {}, {"eager call": "nothing"}, device="cpu")]
    assert outcome(found) == ("library", 2.0, "expert")


@pytest.mark.parametrize("changes", ({"device": "cpu"}, {"quick": True}))
def test_rows_that_say_nothing_about_a_gpu_are_refused(changes, tmp_path):
    wrong = [{**row, **changes} for row in projection()]
    what = "a row of a CPU" if "device" in changes else r"a row of small shapes \(--quick\)"
    with pytest.raises(ValueError, match=f"the shipped table is for GPUs, from full measurements; got {what}: projection, a case"):
        decided([*projection(), *wrong])
    before = choices.SHIPPED.read_bytes(), PAGE.read_bytes()
    ran = command(tmp_path, wrong)
    assert ran.returncode == 2 and "choices.py: error: the shipped table is for GPUs" in ran.stderr
    assert (choices.SHIPPED.read_bytes(), PAGE.read_bytes()) == before and not (tmp_path / "out").exists()


def command(tmp_path, found):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    command = [sys.executable, ROOT / "bench/choices.py", "--out", tmp_path / "out", file]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)


def test_the_command_writes_what_the_package_reads(tmp_path):
    undecided = rows("layer", LAYER, {"reference": 1.0, "reference absorbed": "its result is wrong"})
    ran = command(tmp_path, [*projection(), *undecided])
    assert ran.returncode == 0 and ran.stdout == f"1 choices in {tmp_path}/out/choices.json\n"
    assert "no choice for ('NVIDIA H200', 'cross_attention_layer'" in ran.stderr and "its result is wrong" in ran.stderr
    (row,), reasons = choices.read(tmp_path / "out/choices.json")
    assert reasons == [] and (row.choice, row.ratio, row.rounds, row.sizes) == ("cuda", 0.5, 30, PROJECTION)
    assert (row.device, row.dtype, row.torch, row.commit) == ("NVIDIA H200", "bfloat16", "2.13.0", "0123456789ab")
    line = (tmp_path / "out/choices.md").read_text().splitlines()[-1]
    assert line == (
        "| NVIDIA H200 | edited_projection | bfloat16 | B = 2, T = 77, D = 768, O = 12480 | cuda | cuda takes 0.50 times as long as triton"
        " | 30 | 2026-01-02, torch 2.13.0, 0123456789ab |"
    )


def test_the_page_is_that_of_the_table():
    page, (shipped, reasons) = PAGE.read_text(encoding="utf-8"), choices.read(choices.SHIPPED)
    assert reasons == [] and len(PLACE.findall(page)) == page.count("<!-- choices -->") == 1
    assert refreshed(page, shipped) == page, "python bench/choices.py"
    more = shipped + list(decided(list(projection())).values())
    assert refreshed(page, more) != page and table(more) in refreshed(page, more) and refreshed(refreshed(page, more), shipped) == page


def test_an_empty_table_says_that_nothing_was_measured():
    assert "Nothing has been measured on a GPU" in table([])
