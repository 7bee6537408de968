"""diffusers' own tests of the pipelines that concepts work with, each one plain and twice with perfusion attached: none may be lost.

    python -m tests.peers FOLDER [--offline] [--rows FILE] [part of a test file's path ...] [options of pytest]

FOLDER is a checkout of diffusers, best of the installed version. Its tests load small tokenizers from the model hub, so they need the
network or a filled cache; with --offline they get stand-ins instead, and those that compare with numbers are then not counted. A test
that passes plain runs again with every pipeline attached at its first call, and once more with a concept loaded that no prompt names.
One that then fails is lost: it is printed, and makes the exit status 1. What does not pass plain is not counted.

--rows appends a line of JSON for each test file, as bench/results/peers.jsonl has them, of which docs/pipelines.md shows a table:
`python -m tests.peers --page` writes it anew.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

MODES = ("plain", "attached", "loaded")
VARIABLE = "PERFUSION_PEERS"  # the file of outcomes, for the plugin below
FOLDERS = (
    "stable_diffusion", "stable_diffusion_2", "stable_diffusion_adapter", "stable_diffusion_xl", "controlnet", "pag", "animatediff",
    "latent_consistency_models", "kolors", "pixart_alpha", "pixart_sigma",
)  # fmt: skip
HERE = Path(__file__).parents[1]
ROWS, PAGE = HERE / "bench/results/peers.jsonl", HERE / "docs/pipelines.md"


def test_files(folder: Path) -> list[Path]:
    """The files of a diffusers checkout that test the pipelines of docs/pipelines.md."""
    found = [path for name in FOLDERS for path in sorted((folder / "tests/pipelines" / name).glob("test_*.py"))]
    found = [path for path in found if not any(word in path.name for word in ("flax", "onnx", "sd3", "flux", "hunyuan", "sana", "_video"))]
    if not found:
        raise SystemExit(f"{folder} has no tests/pipelines/stable_diffusion/test_*.py: give a checkout of diffusers.")
    return found


def outcomes(folder: Path, file: Path, options: list[str], hub: dict[str, str]) -> dict[str, dict[str, str]]:
    """test -> mode -> passed, failed or skipped, of one file, from one run of pytest. hub: environment variables of the model hub."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "outcomes.jsonl")
        # diffusers' tests are a package called `tests` too, so this file goes by another name there
        Path(scratch, "perfusion_peers.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
        paths = [scratch, str(folder), str(HERE), str(HERE / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, **hub, "PYTHONPATH": os.pathsep.join(paths), VARIABLE: str(report)}
        command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(folder), "-p", "perfusion_peers", *options, str(file)]
        status = subprocess.run(command, cwd=folder, env=environment).returncode
        if status not in (0, 1, 5):  # passed, failed, nothing found: what else there is, is no outcome of the tests
            raise SystemExit(f"pytest ended with {status}; what it printed says why.")
        lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
        return {each["test"]: each["outcomes"] for each in map(json.loads, lines)}


def row_of(file: str, found: dict[str, dict[str, str]], offline: bool) -> dict[str, Any]:
    """What bench/results/peers.jsonl keeps of a file: how many tests did what, and which were lost."""
    plain = Counter(each["plain"] for each in found.values())
    lost = {mode: sorted(test for test, each in found.items() if each.get(mode, "passed") == "failed") for mode in MODES[1:]}
    counts = {"passed": plain["passed"], "failed": plain["failed"], "skipped": plain["skipped"]}
    return {"file": file, "diffusers": metadata.version("diffusers"), "offline": offline, **counts, "lost": lost}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of the page's table."""
    lines = ["| Tests | pass plain | of these attached | with a concept loaded | fail plain | skipped |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["file"]):
        kept = [str(row["passed"] - len(row["lost"][mode])) for mode in MODES[1:]]
        lines.append(" | ".join([f"| {row['file']}", str(row["passed"]), *kept, str(row["failed"]), f"{row['skipped']} |"]))
    total = [sum(row[key] for row in rows) for key in ("passed", "failed", "skipped")]
    kept = [str(total[0] - sum(len(row["lost"][mode]) for row in rows)) for mode in MODES[1:]]
    return [*lines, " | ".join(["| all", str(total[0]), *kept, str(total[1]), f"{total[2]} |"])]


def page() -> str:
    """docs/pipelines.md with the table of bench/results/peers.jsonl, of which the last line of each file counts."""
    rows = {row["file"]: row for row in map(json.loads, ROWS.read_text(encoding="utf-8").splitlines())}
    before, mark, rest = PAGE.read_text(encoding="utf-8").partition("<!-- Peers -->\n")
    return before + mark + "\n".join(table(list(rows.values()))) + "\n<!-- end of peers -->" + rest.partition("<!-- end of peers -->")[2]


def main(arguments: list[str]) -> int:
    if not arguments:
        raise SystemExit(__doc__)
    if arguments == ["--page"]:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    folder, rest = Path(arguments[0]).resolve(), arguments[1:]
    kept = Path(rest.pop(at := rest.index("--rows")) and rest.pop(at)).resolve() if "--rows" in rest else None
    files, offline = test_files(folder), "--offline" in rest
    chosen = [each for each in rest if any(each in str(path) for path in files)]
    options = [each for each in rest if each not in chosen and each != "--offline"]
    files = [path for path in files if not chosen or any(each in str(path) for each in chosen)]
    from tests import peers_hub  # here, for among diffusers' tests this file is a plugin, and `tests` is theirs

    rows = []
    with tempfile.TemporaryDirectory() as cache:
        hub = peers_hub.write(Path(cache)) if offline else {}
        for path in files:
            name = str(path.relative_to(folder / "tests/pipelines"))
            rows.append(row_of(name, outcomes(folder, path, options, hub), offline))
            print(json.dumps(rows[-1]), flush=True)
            if kept is not None:
                with kept.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(rows[-1]) + "\n")
    plain = sum(row["passed"] for row in rows)
    if not plain:
        raise SystemExit("no test passes without perfusion, so there is nothing to compare; can the tests' tokenizers be loaded?")
    for mode in MODES[1:]:
        names = [name for row in rows for name in row["lost"][mode]]
        print(f"{mode}: {plain - len(names)} of {plain} tests that pass plain")
        for name in names:
            print(f"  lost: {name}")
    return int(any(row["lost"][mode] for row in rows for mode in MODES[1:]))


# the plugin


class Attaching:
    """Runs a test in each mode, as long as it passes. mode: what happens at the first call of a pipeline now."""

    def __init__(self, report: Path):
        import diffusers

        self.report, self.mode = report, MODES[0]
        for name in dir(diffusers):
            kind = getattr(diffusers, name) if name.endswith("Pipeline") else None
            if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline) and "__call__" in vars(kind):
                kind.__call__ = self.attaching(kind.__call__)

    def attaching(self, call: Any) -> Any:
        @functools.wraps(call)
        def attached(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            if self.mode != "plain" and getattr(pipe, "_perfusion_handle", None) is None:
                from perfusion.base import UnsupportedPipeline
                from perfusion.handle import attach

                try:
                    handle = attach(pipe)
                except UnsupportedPipeline:
                    return call(pipe, *args, **kwargs)
                if self.mode == "loaded":
                    handle.load(_concept(pipe))
            return call(pipe, *args, **kwargs)

        return attached

    def pytest_collection_finish(self) -> None:
        gc.freeze()  # the tests collect garbage before and after each one; what was imported is none

    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> bool:
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        found = dict(self.run(item, nextitem))
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        with self.report.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"test": item.nodeid, "outcomes": found}) + "\n")
        return True

    def run(self, item: Any, nextitem: Any) -> Iterator[tuple[str, str]]:
        from _pytest.runner import runtestprotocol

        for mode in MODES:
            self.mode = mode
            if hasattr(item, "_initrequest"):
                item._initrequest()  # fixtures anew, as for a test that is run again
            reports = runtestprotocol(item, nextitem=nextitem, log=False)
            for report in reports:
                if mode == MODES[-1] or not report.passed:
                    item.ihook.pytest_runtest_logreport(report=report)
            outcome = next((report.outcome for report in reports if not report.passed), "passed")
            yield mode, outcome
            if outcome != "passed" and mode == "plain":
                break


def pytest_configure(config: Any) -> None:
    if VARIABLE in os.environ:
        config.pluginmanager.register(Attaching(Path(os.environ[VARIABLE])), "perfusion-peers")


def _concept(pipe: Any) -> Any:
    """A random concept of the pipeline's shape, called by a word that its tokenizers have."""
    import torch

    from perfusion.base import describe_base, text_encoders
    from perfusion.concept import Concept

    base = describe_base(pipe, text_required=False)
    if not base.text_encoder:  # of a pipeline that is given encodings: its concepts were made where there were encoders
        base = dataclasses.replace(base, text_encoder=base64.b64encode(bytes([1] * 32)).decode("ascii"))
    numbers = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    target = numbers(base.encoding_dim)
    return Concept(
        name="perfusion-peer",
        superclass=_word([tokenizer for tokenizer, _ in text_encoders(pipe, required=False)]),
        base=base,
        value_outputs=numbers(base.outputs),
        target=target,
        metric_target=target,  # as if the encodings had unit covariance
        superclass_encoding=numbers(base.encoding_dim),
        word_embeddings=tuple(numbers(width) for width in base.text_widths),
        key_outputs=None,
    )


def _word(tokenizers: list[Any]) -> str:
    """A word that is one token of all tokenizers."""
    words = sorted(tokenizers[0].get_vocab()) if tokenizers else ["thing"]
    whole = [each for each in words if each.endswith("</w>") or each.startswith("▁") or not tokenizers]
    for word in (each.removesuffix("</w>").removeprefix("▁") for each in whole):
        if word.isalpha() and all(len(each(word, add_special_tokens=False).input_ids) == 1 for each in tokenizers):
            return word
    return "thing"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
