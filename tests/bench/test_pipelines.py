"""Suites of whole UNets: in small they run, agree with one another, and say who is absent and why."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import all as everything
from bench import peers, rows, timing
from bench.measure import Options
from bench.report import tables
from bench.suites import pipelines, static, step
from perfusion.base import describe_base
from perfusion_kernels import edited_attention
from tests.kernels.tolerance import assert_close, exactly
from tests.perfusion.editing import make_concept
from tests.perfusion.tiny import tiny_sd

pytestmark = pytest.mark.bench

ROOT = Path(__file__).parents[2]
MUST_RUN = {
    "step": {"stock", "attached", "perfusion", "perfusion, hooks", "expert", "gated edit", "LoRA", "LoRA fused"},
    "tenants": {"stock", *(f"{way}, {n}" for way in ("perfusion", "PEFT mixed batch") for n in (1, 2, 4))},
    "swap": {"step", "perfusion, from memory", "perfusion, from its file", "LoRA, load", "LoRA, load and fuse", "LoRA, hot swap"},
    "capacity": {"4 resident", "16 resident"},
}


@functools.cache
def quick(folder):
    file = Path(folder) / "rows.jsonl"
    suites = [word for suite in (*MUST_RUN, "static") for word in ("--suite", suite)]
    command = [sys.executable, ROOT / "bench/run.py", *suites, "--quick", "--device", "cpu", "--compile", "none", "--out", file]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return rows.read(file)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return quick(str(tmp_path_factory.mktemp("rows")))


@pytest.mark.proof
@pytest.mark.parametrize("suite", MUST_RUN)
def test_whole_models_run_in_small(found, suite):
    mine = [row for row in found if row["suite"] == suite]
    passed = {row["provider"] for row in mine if row["gate"] == "passed"}
    assert passed >= MUST_RUN[suite], {row["provider"]: row.get("reason") for row in mine}
    for row in mine:
        if row["gate"] == "passed":
            others = passed - {row["provider"]}
            assert row["ratios"].keys() == row["intervals"].keys() == others
            assert all(low <= row["ratios"][name][1] <= high for name, (low, high) in row["intervals"].items())
        else:
            assert row["gate"] == "not passed" and len(row["reason"]) > 10
    if suite == "step":
        assert {"stock compiled", "perfusion compiled"} == {row["provider"] for row in mine if "--compile none" in row.get("reason", "")}
        page = tables(mine, "stock")
        assert "- stock compiled, tiny, 2 rows: absent, left out by --compile none" in page and "| stock | 1 |" in page


@pytest.mark.proof
def test_launches_are_counted(found):
    counted = {row["provider"]: row["value"] for row in found if row["suite"] == "static" and row["gate"] == "counted"}
    assert counted["perfusion"] < counted["stock"] < counted["gated edit"] < counted["PEFT mixed batch, 16"]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_memory_of_a_concept_and_of_a_slot_is_as_the_rows_say(name):
    kept = {row["what"]: row["value"] for row in rows.read(ROOT / "bench/results/static.jsonl") if row["case"] == name and "memory" in row["what"]}
    assert len(kept) == 2 and static.memory(name) == kept


def test_a_step_in_half_precision_agrees(monkeypatch):
    """As on a GPU, where the kernels take 16 bits alone."""
    options = Options(device=torch.device("cpu"), dtype=torch.float16, quick=True, rounds=(1, 1), seconds=0.0, compile=())
    found = {row["provider"]: row for row in step.measured(options)}
    assert {name for name, row in found.items() if row["gate"] == "passed"} == MUST_RUN["step"]
    assert {row["dtype"] for row in found.values()} == {"float16"} and "operators" in found["perfusion"]


def test_operators_of_a_step_are_named_with_their_backend():
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 3, 2, 8)
    assert step.operators(lambda: edited_attention(query, key, key, backend="reference")) == ["edited_attention.reference"]


def test_operators_that_only_call_others_count_for_nothing():
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    assert static.launches(lambda: torch.nn.functional.linear(a, b)) == 1
    assert static.launches(lambda: a.view(2, 8).transpose(0, 1)) == 0
    assert static.launches(lambda: (a + b).reshape(-1).softmax(0)) == 2


def test_an_interval_holds_the_median():
    least, largest = timing.median_interval(torch.arange(1.0, 101.0))
    assert (least, largest) == (40.0, 61.0)
    assert timing.median_interval(torch.tensor([3.0, 1.0, 2.0])) == (1.0, 3.0), "of three, nothing narrower is certain"
    draw = torch.Generator().manual_seed(0)
    intervals = [timing.median_interval(torch.randn(25, generator=draw)) for _ in range(1000)]
    assert 0.94 < sum(low <= 0 <= high for low, high in intervals) / 1000 <= 1


@pytest.mark.numeric
def test_peers_compute_the_published_formula():
    """The expert's step is that of the module that edits at every step, which is eq. 3 in float64."""
    pipe = tiny_sd()
    concept = make_concept(describe_base(pipe), "teddy")
    e, weight, output = torch.randn(1, 77, 16), torch.randn(8, 16), torch.randn(8)
    double = concept.to(dtype=torch.float64)

    def equation_3(e, weight, output):
        similarity = (e @ double.metric_target) / (double.target @ double.metric_target)
        gate = torch.sigmoid((similarity - concept.bias) / concept.temperature)[..., None]
        return (e - similarity[..., None] * double.target) @ weight.T + gate * output

    assert_close(peers.eq3(e, concept, weight, output), *exactly(equation_3, e.double(), weight.double(), output.double()))


def test_what_does_not_fit_is_said(monkeypatch):
    monkeypatch.setattr(pipelines, "free_memory", lambda: 2e9)
    options = type("Options", (), {"device": torch.device("cpu")})
    pipe, reason = pipelines.opened("sdxl", pipelines.MODELS["sdxl"], options)
    assert pipe is None and "10.6 GB" in reason and "2.0 GB free" in reason


def test_a_stage_that_takes_too_long_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["all.py", "--minutes", "0.001", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="nothing was measured"):
        everything.main()
    text = (tmp_path / "report.md").read_text()
    assert all(f"- {stage.name}: no time was left" in text for stage in everything.STAGES)
    reason = everything.run(everything.Stage("slow", "--suite static", "stock"), tmp_path, 0.2, [])
    assert "stopped after" in reason and "0 rows were there" in reason
    reason = everything.run(everything.Stage("wrong", "--suite no-such-suite", "stock"), tmp_path, 60, [])
    assert "status 2" in reason and "no-such-suite" in reason


def test_stages_name_suites_that_are_there():
    from bench import run, suites

    for stage in everything.STAGES + everything.ON_GPU:
        assert set(run.parse([*stage.options.split(), "--out", "x", "--device", "cpu"]).suite) <= set(suites.NAMES)
