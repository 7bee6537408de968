"""Plots, comparisons, regressions and counters: read from rows, and wrong by name where they cannot."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import chips, compare, nsight, plot, predictions, roofline, rows
from bench.chips import CHIPS
from bench.predictions import tables as prediction_tables
from bench.regression.__main__ import compared, ratios
from bench.report import tables
from bench.suites import gradients

pytestmark = pytest.mark.bench

ROOT = Path(__file__).parents[2]

# plot


def saved():
    return [row for row in plot.read(sorted(plot.RESULTS.glob("*.jsonl"))) if {"suite", "gate", "provider"} <= row.keys()]


@pytest.mark.smoke
def test_shipped_plots_are_of_the_shipped_rows():
    assert plot.stale(saved(), plot.PLOTS) == [], "python bench/plot.py"
    assert {path.stem for path in plot.PLOTS.glob("*.png")} == set(plot.PLOTTED)


def test_a_stale_plot_is_found(tmp_path):
    found = saved()
    shutil.copytree(plot.PLOTS, tmp_path / "plots")
    next(row for row in found if row["suite"] == "storage" and "file_bytes" in row)["file_bytes"] += 1
    assert plot.stale(found, tmp_path / "plots") == ["storage"]
    (tmp_path / "plots/capacity.png").unlink()
    assert plot.stale(found, tmp_path / "plots") == ["storage", "capacity"]


def test_measured_kernels_take_the_place_of_predictions(tmp_path):
    pytest.importorskip("matplotlib")
    one = {"suite": "attention", "provider": "cuda graph", "gate": "passed", "flops": 2e9, "bytes": 1e7, "flops_per_s": 3e14}
    assert plot.predicted_kernels([one, {**one, "provider": "expert"}]) == [one]
    assert {row["gate"] for row in plot.predicted_kernels([])} == {"predicted"}
    plot.draw("roofline", [one], tmp_path)
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def test_every_suite_has_a_point_on_the_roofline():
    """However many there are: colours and shapes come again."""
    figures = pytest.importorskip("matplotlib.figure")
    figure = figures.Figure()
    row = {"gate": "passed", "flops": 2e9, "bytes": 1e7, "flops_per_s": 3e14}
    names = [f"suite {number}" for number in range(9)]
    plot.roofline(figure, [{**row, "suite": name} for name in names])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == names


# predictions


def test_a_measured_kernel_stands_beside_its_prediction():
    known = [each for each in predictions.read("H100") if each["kernel"] == "edited_attention" and each["rows"] == 2]
    expected, edited, of_triton = (
        next(each for each in known if (each["backend"], each["J"]) == wanted) for wanted in (("cuda", 0), ("cuda", 1), ("triton", 0))
    )
    shapes = {"B": 2, "T": 77, "J": 0, **{name: expected[name] for name in ("N", "H", "d")}}
    row = {"suite": "attention", "case": "c", "provider": "cuda graph", "device": "NVIDIA H100 80GB HBM3", "shapes": shapes, "gate": "passed"}
    assert predictions.of(row) == expected
    assert predictions.of({**row, "provider": "triton graph"}) == of_triton
    assert predictions.of({**row, "shapes": {**shapes, "J": 1}}) == edited and edited["microseconds"] > expected["microseconds"]
    changes = ({"provider": "cuda"}, {"provider": "expert graph"}, {"device": "cpu"}, {"shapes": {**shapes, "J": 3}}, {"shapes": {}})
    assert all(predictions.of({**row, **change}) is None for change in changes)
    assert predictions.of({**row, "device": "NVIDIA A100-SXM4-40GB"})["chip"] == "A100"
    of_derivatives = {**row, "suite": "gradients", "operator": "edited_attention_backward", "provider": "triton graph"}
    assert predictions.of(of_derivatives)["kernel"] == "edited_attention_backward" and predictions.of({**of_derivatives, "provider": "cuda graph"}) is None
    page = tables([{**row, "dtype": "bfloat16", "median_us": 2 * expected["microseconds"], "ratios": {}}], "expert")
    assert "| attention, c | cuda graph |" in page and "| 2.00 |" in page


def test_what_is_predicted_is_measured_by_the_first_run():
    """Each kernel of each backend, by a suite of bench/gpu.sh, at two rows."""
    asked = set(re.findall(r"--suite (\w+)", (ROOT / "bench/gpu.sh").read_text()))
    suites = {*(suite for suite in predictions.KERNELS if suite in asked), *(["gradients"] if "gradients" in asked else [])}
    measured = {predictions.KERNELS[suite] for suite in suites - {"gradients"}} | {"fused_edited_projection"}
    measured |= {f"{name}_backward" for name in gradients.NEEDED} if "gradients" in suites else set()
    assert {each["kernel"] for each in predictions.read("H100") if each["rows"] == 2} == measured


def test_a_chip_is_known_by_its_whole_name():
    """Of one with the same letters, or the same name and another memory, nothing was predicted, and no floor is known."""
    known = ("NVIDIA A100-SXM4-40GB", "NVIDIA GeForce RTX 4090", "NVIDIA A10", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200")
    assert [chips.of_device(name) for name in known] == ["A100", "RTX 4090", "A10", "H100", "H200", "B200"]
    others = ("NVIDIA A10G", "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB")
    assert not any(chips.of_device(name) for name in (*others, "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "cpu"))


def test_every_prediction_is_above_its_floor():
    for each in predictions.read("H200"):
        seconds = 1e-6 * each["microseconds"]
        assert seconds > CHIPS["H200"].floor(predictions.work(each)), each
        if not each["kernel"].startswith("concept_gates"):  # whose scalar operations no kernel does at the model's rate
            assert seconds > predictions.work(each).floor(roofline.H200), each


def test_the_predictions_of_triton_are_of_its_tiles_and_its_machine_code():
    """The remedy: python -m bench.predictions."""
    triton = pytest.importorskip("bench.predictions.triton", exc_type=ImportError)
    saved = [row for chip in CHIPS for row in predictions.read(chip, "triton")]
    assert saved == list(triton.rows())


def test_every_kernel_has_a_table_of_predictions_on_its_page():
    for page in prediction_tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert prediction_tables.refreshed(text) == text, "python -m bench.predictions"
    found = {(match["backend"], match["kernel"]) for page in prediction_tables.PAGES for match in prediction_tables.PLACE.finditer(page.read_text())}
    assert found == {(each["backend"], each["kernel"]) for each in predictions.read("A100")} - {("cuda", "edited_projection")}  # as its fused form


# compare


def attention_rows(**times):
    for provider, time in times.items():
        ratios = {other: [time / its] * 3 for other, its in times.items() if other != provider}
        yield {"suite": "attention", "case": "c", "provider": provider, "gate": "passed", "ratios": ratios}


def test_two_commits_are_compared_by_what_each_takes_beside_the_expert():
    base = [compare.speeds(list(attention_rows(cuda=2.0 * busy, expert=4.0 * busy))) for busy in (1, 3, 1, 1)]
    head = [compare.speeds(list(attention_rows(cuda=1.0, expert=4.0, reference=9.0))) for _ in range(4)]
    lines = compare.compared(base, head)
    assert lines[2] == "| attention | c | cuda | 0.500 faster | 0.500 | 0.500 |"
    assert lines[-1] == "- measured by head alone: attention, c, reference" and not any("expert" in line for line in lines)
    assert "faster" not in compare.compared(base[:3], head[:3])[2], "three repeats are no proof"
    assert "1.000 |" in compare.compared(base, base)[2]


def test_a_commit_that_is_not_there_is_said():
    ran = subprocess.run([sys.executable, ROOT / "bench/compare.py", "no-such-branch", "HEAD", "--suite", "gates"], capture_output=True, text=True)
    assert ran.returncode == 1 and "no-such-branch" in ran.stderr and "Traceback" not in ran.stderr


# regression


def test_ratios_to_the_yardstick():
    run = {"benchmarks": [{"name": name, "stats": {"median": median}} for name, median in (("test_yardstick", 0.5), ("test_load", 2.0))]}
    assert ratios(run) == {"test_load": 4.0}
    lines, slower = compared({"a": 2.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": 1.0, "d": 1.0}, 1.5)
    assert slower == ["a"] and len(lines) == 5 and any("new" in line for line in lines) and any("was there" in line for line in lines)


@pytest.mark.proof
def test_the_regression_runs_saves_and_compares(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "bench.regression", "--saved", tmp_path / "saved.json", "--limit", "1000"]
    command += ["--benchmark-max-time=0.05", "--benchmark-min-rounds=3"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # no worker of ours
    first, second = (subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0 and "saved in" in first.stdout, first.stderr
    assert second.returncode == 0 and "now/saved" in second.stdout, second.stderr
    found = json.loads((tmp_path / "saved.json").read_text())
    assert {"test_load", "test_swap", "test_personalised_step", "test_operator[edited_attention]"} <= found.keys()


# nsight

PAGE = '''==PROF== Connected to process 12
==PROF== Disconnected from process 12
"ID","Kernel Name","Grid Size","gpu__time_duration.sum","lts__t_bytes.sum","dram__bytes.sum","smsp__issue_active.avg.pct_of_peak_sustained_active"
"","","","nsecond","byte","byte","%"
"0","void perfusion::edited_attention_kernel<perfusion::BFloat16, 40, 5>(perfusion::Launch)","(264, 1, 1)","6,400","12,800,000","11,000,000","61.5"
'''


def test_counters_become_rows_and_a_table(tmp_path, monkeypatch):
    (row,) = nsight.kernels(PAGE)
    assert row["provider"] == "edited_attention_kernel<perfusion::BFloat16, 40, 5>" and row["grid"] == "(264, 1, 1)"
    assert row["time"] == pytest.approx(6.4e-6) and row["l2_bytes"] == 12.8e6 and row["issue_active"] == 61.5
    page = tables([{**row, "suite": "nsight", "device": "H200", "dtype": "bfloat16"}], "expert")
    assert "| launch 1 | `edited_attention_kernel<perfusion::BFloat16, 40, 5>` | 6.4 | 12.8 | 2.00 | 11.0 | 62 % | 0 |" in page
    assert list(nsight.kernels("nothing here")) == []


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo '==ERROR== ERR_NVGPUCTRPERM - The user does not have permission'; exit 1", "ERR_NVGPUCTRPERM"),
        ("exit 3", "status 3"),
        (f"cat <<'E'\n{PAGE}E", ""),
        (f"cat <<'E'\n{PAGE}E\nexit 3", "the profiled program ended with status 3"),
    ],
)
def test_a_profiler_that_may_not_says_why(tmp_path, monkeypatch, script, said):
    (tmp_path / "ncu").write_text(f"#!/bin/bash\n{script}\n")
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    row = [*nsight.measured()][-1]
    assert said in row.get("reason", "") and row["gate"] == ("not passed" if said else "profiled")
    monkeypatch.setattr(sys, "argv", ["nsight.py", "--out", str(tmp_path / "rows.jsonl")])
    with pytest.raises(SystemExit) as ended:
        nsight.main()
    assert ended.value.code == ("status" in said), "who may not read counters is not wrong"


def test_our_kernels_alone_are_profiled():
    names = set(re.findall(r"^(\w+_kernel)\(PERFUSION_CONSTANT", "".join(f.read_text() for f in (ROOT / "csrc").glob("*.cuh")), re.MULTILINE))
    called = set(re.findall(r"^    +(edited_\w+)\(", inspect.getsource(nsight.target), re.MULTILINE))
    assert {name for name in names if re.search(nsight.KERNELS, name)} == {f"{name}_kernel" for name in called} and len(called) == 2


# storage


def test_a_subject_on_disk():
    found = {(row["case"], row["provider"]): row for row in rows.read(ROOT / "bench/results/storage.jsonl")}
    ours = found["sd15", "perfusion"]
    assert ours["gate"] == "written" and ours["file_bytes"] <= 32 * 1024
    assert 30 * ours["file_bytes"] <= found["sd15", "LoRA, rank 4"]["file_bytes"] < found["sd15", "Custom Diffusion"]["file_bytes"]
