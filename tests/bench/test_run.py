"""bench/run.py: every suite runs in small on a CPU, its rows say all that a row must, and wrong results are never timed."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

import bench.run
from bench import providers, roofline, rows, suites
from bench.measure import Options, Problem, _floor, measure
from bench.report import PLACE, baseline, refreshed, tables
from bench.timing import Candidate, Times, interleave
from perfusion_kernels import BackendUnavailable
from perfusion_kernels.schemas import SCHEMAS

pytestmark = pytest.mark.bench

ROOT = Path(__file__).parents[2]
EVERY = {"suite", "case", "provider", "device", "dtype", "shapes", "torch", "triton", "diffusers", "commit", "date", "gate", "quick"}
TIMED = {"median_us", "p20_us", "p80_us", "repeats", "l2", "clock", "ratios"}
CPU = Options(device=torch.device("cpu"), dtype=torch.float32, quick=True, rounds=(3, 3), seconds=0.01)


@functools.cache
def quick_rows(suite, folder):
    """The command itself, as CI runs it."""
    file = Path(folder) / f"{suite}.jsonl"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    ran = subprocess.run(
        [sys.executable, ROOT / "bench/run.py", "--suite", suite, "--quick", "--device", "cpu", "--out", file],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert (suite == "overhead") == ("µs" in ran.stdout) and f"rows in {file}" in ran.stdout  # of a CPU no time is told
    return rows.read(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("rows"))


MUST_RUN = {
    "gates": {"reference", "eager", "compile", "expert"},
    "projection": {"reference", "reference fused", "eager", "compile", "expert"},
    "attention": {"reference", "eager", "compile", "expert", "sdpa flash", "sdpa math"},
    "fused": {"reference", "eager", "compile", "expert", "sdpa flash", "sdpa math"},
    "gradients": {"reference", "eager", "expert"},
    "layer": {"reference", "expert addmm", "eager", "compile", "expert", "sdpa flash", "sdpa math", "diffusers"},
    "train": {"ours", "plain", "expert"},
    "export": {"torch", "torch, K and V", "onnxruntime", "onnxruntime, by layer"},
}


@pytest.mark.proof
@pytest.mark.parametrize("suite", MUST_RUN)
def test_every_suite_runs_in_small(suite, folder):
    found = quick_rows(suite, folder)
    cases = {row["case"] for row in found}
    for row in found:
        assert row.keys() >= EVERY and row["suite"] == suite and row["device"] == "cpu"
        assert row["torch"] == torch.__version__ and row["processor"] and row["threads"] >= 1
        if row["gate"] == "passed":
            assert row.keys() >= TIMED and 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"] and row["repeats"] >= 3
            assert row["l2"] == "warm"
        else:
            assert row["gate"] == "not passed" and len(row["reason"]) > 10 and not row.keys() & TIMED
        if suite not in ("train", "export"):
            assert row["bytes"] > 0 and row["flops"] > 0 and "floor_us" not in row  # of a chip whose rates are known
    for case in cases:
        ran = {row["provider"] for row in found if row["case"] == case and row["gate"] == "passed"}
        assert ran >= MUST_RUN[suite], f"{case}: {MUST_RUN[suite] - ran} did not run"
        for row in found:
            if row["case"] == case and row["gate"] == "passed":
                assert row["ratios"].keys() == ran - {row["provider"]}


@pytest.mark.smoke
def test_overheads_are_rows(folder):
    found = quick_rows("overhead", folder)
    assert {row["case"] for row in found} == set(SCHEMAS)
    assert {*MUST_RUN, "decide", "overhead", "storage", "startup", "static"} <= set(suites.NAMES)
    for row in found:
        assert row.keys() >= EVERY and row["overhead_us"] > 0 and row["limit_us"] == 15
        assert row["fresh_us"] > row["overhead_us"] and row["fresh_us"] > row["unvalidated_us"] > 0
        numbers = f"{row['overhead_us']:.1f} | 15 | {row['unvalidated_us']:.1f} | {row['fresh_us']:.1f}"
        assert f"| {row['case']} | {numbers} |" in tables(found, "expert")


def test_what_plans_rest_on_has_rows(folder):
    """Of a GPU alone: here, the library's product and ours are compared, and the rest says what is missing."""
    found = {(row["case"].split(",")[0], row["provider"]): row for row in quick_rows("decide", folder)}
    passed = {key for key, row in found.items() if row["gate"] == "passed"}
    assert passed == {("product", "library"), ("product", "reference edited_projection"), ("launch of one block", "torch add_")}
    assert {case for case, _ in found} == {"product", "read", "mma.sync alone", "launch of one block"}
    assert all("need a GPU" in row["reason"] for (_, name), row in found.items() if "mma" in name or name.startswith("ld."))
    page = tables(list(found.values()), "expert")
    assert "| product, 64 x 48 x 32 | library | ran | | |" in page.replace("|  |  |", "| | |")


def test_subjects_are_written_by_their_libraries(folder):
    found = {row["provider"]: row for row in quick_rows("storage", folder)}
    assert found["perfusion"]["gate"] == "written" and found["DreamBooth"]["gate"] == "counted"
    assert found["perfusion"]["file_bytes"] < found["LoRA, rank 4"]["file_bytes"] < found["LoRA, rank 16"]["file_bytes"]
    assert all(row.keys() >= EVERY - {"ratios"} for row in found.values())
    assert "over ours" in tables(list(found.values()), "expert")


@pytest.mark.proof
def test_processes_are_timed_by_their_own_time(folder):
    found = {row["provider"]: row for row in quick_rows("startup", folder)}
    assert all(row["gate"] == "passed" and row["clock"] == "processor time" for row in found.values())
    assert found["import perfusion"]["ratios"]["import torch"][1] < 0.5, "it imports nothing heavy"
    assert found["import perfusion"]["peak_bytes"] < found["import torch"]["peak_bytes"] / 3
    assert "| import perfusion |" in tables(list(found.values()), "expert")


def test_a_graph_goes_through_copies(monkeypatch):
    """Twenty calls, each with the tensors of the next copy, whose results are checked on those of the first."""

    class Graph(providers._Graphed):
        def _capture(self):
            self.results = [self.calls[number % len(self.calls)]() for number in range(providers.CALLS)]
            self.result, self.graph = self.results[0], type("Replayed", (), {"replay": lambda self: None})()

    monkeypatch.setattr(providers, "_Graphed", Graph)
    lists = [[Candidate("ours", lambda n=n: n, on_graph=True), Candidate("slow", lambda: None)] for n in range(3)]
    plain, graph, slow = providers.with_graphs(lists[0], lists[1:])
    assert (plain.provider, graph.provider, slow.provider, graph.calls) == ("ours", "ours graph", "slow", 20)
    assert providers.attempt(graph) == (0, "", "") and graph.call.results == [number % 3 for number in range(20)]
    clock = iter(range(10**6))
    (times,) = interleave([graph], torch.device("cpu"), seconds=0, rounds=(3, 3), clock=lambda: next(clock))
    assert times.samples.tolist() == [1 / 20] * 3, "times are of one call"


@pytest.mark.parametrize("suite", ["gates", "projection", "attention", "fused", "layer"])
def test_copies_share_what_is_compiled(suite, monkeypatch):
    """A problem has up to twenty copies of its tensors for its graphs, and compiles its formula once in each mode for all of them."""
    made, whole = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode, **more: made.append(mode) or whole(function, backend=compiler, **more))
    compiler = torch._dynamo.testing.CompileCounter()
    providers._compiled.cache_clear()
    options = dataclasses.replace(CPU, compile=("default", "max-autotune"), places=(1,))
    (problem,) = suites.problems(suite, options)
    for candidates in (problem.candidates, *problem.copies()[:3]):
        for candidate in candidates:
            if candidate.provider.startswith("compile"):
                candidate.call()
    providers._compiled.cache_clear()
    assert made == ["default", "max-autotune-no-cudagraphs"] and compiler.frame_count == 2


@pytest.mark.parametrize("more", [["--suite", "gates", "--compile", "max-autotune"], ["--suite", "layer"]])
def test_missing_rows_are_of_a_compiled_formula_at_a_layer(more, capsys):
    with pytest.raises(SystemExit):
        bench.run.parse([*more, "--missing", "--device", "cpu", "--out", "x"])
    assert "--missing is for --suite attention and layer, and for a mode of torch.compile" in capsys.readouterr().err


def test_reasons_name_what_is_missing(folder):
    reasons = {row["provider"]: row["reason"] for row in quick_rows("attention", folder) if row["gate"] != "passed"}
    assert "No viable backend" in reasons["sdpa cudnn"] and "cuda" in reasons
    assert "need tensors on a GPU" in reasons["triton"] or "Triton" in reasons["triton"]


def test_a_table_is_made_of_rows_alone(folder):
    page = tables(quick_rows("attention", folder), "expert")
    assert "CPU ratios; time over that of `expert`" in page and "µs" not in page
    assert "- sdpa cudnn did not run: " in page
    again = tables([{**row, "device": "H200"} for row in quick_rows("gates", folder)], "expert")
    assert "Ratios on one H200" in again and "| µs | ours, of the floor |" in again


def on_h200(suite, case, floor_us=None, **times):
    common = {"suite": suite, "case": case, "device": "NVIDIA H200", "dtype": "bfloat16", "gate": "passed"}
    for provider, time in times.items():
        ratios = {other: [time / its] * 3 for other, its in times.items() if other != provider}
        floor = {"floor_us": floor_us} if floor_us else {}
        yield {**common, "provider": provider.replace("_", " "), "median_us": time, **floor,
               "ratios": {name.replace("_", " "): value for name, value in ratios.items()}}  # fmt: skip


def test_a_table_divides_by_the_strongest_and_tells_our_own_part_of_the_floor():
    rows = [
        *on_h200("attention", "c", 2.0, cuda=9.0, cuda_graph=4.0, expert=16.0, expert_graph=8.0),
        *on_h200("layer", "l", cuda_graph=4.0, expert_graph=8.0, expert_addmm_graph=5.0),
        *on_h200("attention", "only eager", 2.0, triton=5.0, expert=10.0),
    ]
    page = tables(rows)
    assert "time over that of `expert graph`" in page and "| c | 1.12 | 0.50 | 2.00 | 1 | – | 8.0 | 0.50 (cuda graph) |" in page
    assert "time over that of `expert addmm graph`" in page and "| l | 0.80 | 1.60 | 1 | 5.0 |  |" in page
    assert "| only eager | – | – | ? | – | ? |  | 0.40 (triton) |" in page
    assert "time over that of `expert`**" in tables(rows, "expert")
    assert "no time of compile max-autotune, not measured yet, 2: c; only eager\n" in page
    wrong = {"suite": "attention", "case": "c", "device": "NVIDIA H200", "dtype": "bfloat16", "provider": "compile max-autotune", "gate": "not passed"}
    edited = {**rows[0], "case": "e", "shapes": {"J": 1}}
    page = tables([*rows, {**wrong, "reason": "its result is wrong"}, edited])
    assert "max-autotune, its result is wrong, 1: c\n- no time of compile max-autotune, not measured yet, 1: only eager\n" in page
    assert baseline("step", {}) == "stock" and baseline("gates", {}) == "expert"


def test_the_floor_is_the_chips_own():
    work = roofline.edited_attention(B=2, N=4096, T=77, H=8, d=40)
    h200, h100 = (_floor(work, name) for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"))
    assert h200["floor_of"] == "H200" and h200["floor_us"] == pytest.approx(h100["floor_us"] * 3.35 / 4.8, rel=1e-3)
    assert _floor(work, "NVIDIA GH200 480GB") == {"bytes": work.bytes, "flops": work.flops} and _floor(None, "NVIDIA H200") == {}


def test_a_case_measured_twice_counts_as_it_was_last():
    def measured(ratio):
        one = {"suite": "s", "case": "c", "device": "cpu", "dtype": "float32", "gate": "passed"}
        yield {**one, "provider": "expert", "ratios": {"ours": [1 / ratio] * 3}}
        yield {**one, "provider": "ours", "ratios": {"expert": [ratio] * 3}}

    page = tables([*measured(0.5), *measured(0.25)], "expert")
    assert "| c | 1 | 0.25 |" in page and "0.50" not in page


@pytest.mark.smoke
def test_tables_of_pages_are_those_of_the_rows():
    pages = [page for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if "<!-- rows: " in page.read_text()]
    assert {ROOT / "README.md", ROOT / "docs/benchmarks.md"} <= set(pages)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- rows: ") == len(PLACE.findall(text)) and refreshed(text) == text, f"python bench/report.py --page {page}"


# The gate


def problem(*candidates):
    exact = torch.linspace(0, 1, 8, dtype=torch.float64).reshape(2, 4)
    return Problem("c", {"B": 2}, torch.float32, torch.tensor([[1], [2]]), lambda: exact, lambda: exact.float(), list(candidates))


@pytest.mark.smoke
def test_who_is_wrong_is_not_timed():
    right = torch.linspace(0, 1, 8).reshape(2, 4)
    slots = torch.stack([right[0], right[1] + 1e-3])
    calls = []

    def fails():
        raise RuntimeError("no such kernel")

    found = measure(
        "s",
        problem(
            Candidate("right", lambda: right),
            Candidate("wrong", lambda: calls.append(1) or slots),
            Candidate("short", lambda: right[:, :3]),
            Candidate("other", lambda: right.double()),
            Candidate("fails", fails),
            Candidate("absent", None, "it is not here"),
        ),
        CPU,
    )
    found = {row["provider"]: row for row in found}
    assert found.pop("right")["gate"] == "passed"
    assert all("median_us" not in row for row in found.values()) and len(calls) == 1
    assert "its result is wrong, all rows: error 0.001" in found["wrong"]["reason"]
    assert found["short"]["reason"] == "it gives torch.float32 [2, 3], not torch.float32 [2, 4]"
    assert "torch.float64" in found["other"]["reason"]
    assert found["fails"]["reason"] == "no such kernel" and found["absent"]["reason"] == "it is not here"


def test_a_wrong_kernel_of_ours_is_a_failure_behind_all_rows(tmp_path, monkeypatch, capsys):
    right = torch.linspace(0, 1, 8).reshape(2, 4)
    candidates = [("expert", right + 1), ("sdpa flash", right[:1]), ("cuda", right), ("reference", right)]

    def main(*more):
        found = [Candidate(name, functools.partial(*call) if callable(call[0]) else lambda call=call: call[0]) for name, *call in (*more, *candidates)]
        monkeypatch.setattr(bench.run.suites, "measured", lambda suite, options: measure(suite, problem(*found), CPU))
        monkeypatch.setattr(sys, "argv", ["run.py", "--suite", "gates", "--device", "cpu", "--out", str(tmp_path / "rows.jsonl")])
        bench.run.main()

    def fails(error):
        raise error

    main(("triton", fails, BackendUnavailable("no GPU")))
    with pytest.raises(SystemExit, match="wrong or failed, 2 times:\ngates, c, cuda graph: its result is wrong.*\ngates, c, triton: illegal access"):
        main(("cuda graph", right + 1), ("triton", fails, RuntimeError("illegal access")))
    found = [(row["provider"], row.get("error")) for row in rows.read(tmp_path / "rows.jsonl") if row["gate"] != "passed"]
    others = [("expert", "wrong result"), ("sdpa flash", "wrong result")]
    assert found == [("triton", "BackendUnavailable"), *others, ("cuda graph", "wrong result"), ("triton", "RuntimeError"), *others]


# Times


def test_candidates_take_turns_in_changing_order():
    calls = []
    candidates = [Candidate(name, lambda name=name: calls.append(name)) for name in "abc"]
    clock = iter(range(10**6))
    times = interleave(candidates, torch.device("cpu"), seconds=0, rounds=(8, 8), clock=lambda: next(clock))
    assert [len(each.samples) for each in times] == [8, 8, 8] and calls[:3] == ["a", "b", "c"]
    rounds = ["".join(calls[start : start + 3]) for start in range(3, 27, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds) and len(set(rounds)) > 1


def test_ratios_are_taken_round_by_round():
    """A slow moment that touches both candidates of a round leaves the ratio alone."""
    slow = torch.tensor([1.0, 1.0, 9.0, 1.0, 5.0], dtype=torch.float64)
    assert Times(2 * slow).ratio(Times(slow)) == (2.0, 2.0, 2.0)
    low, middle, high = Times(torch.arange(1, 102, dtype=torch.float64)).quantiles()
    assert (low, middle, high) == (21, 51, 81)


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        return
    ran = subprocess.run(
        [sys.executable, ROOT / "bench/run.py", "--suite", "gates", "--device", "cuda", "--out", "x"], capture_output=True, text=True
    )
    assert ran.returncode == 2 and "torch sees no GPU here" in ran.stderr
