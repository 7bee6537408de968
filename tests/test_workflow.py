"""What CI would do, without doing it: workflows are valid, call what is there, are limited in time, and may write nothing."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
JOBS = {"lint", "test", "proof", "tiers", "studio", "lower-bounds", "wheel"}


def jobs():
    for file in FILES:
        yield from yaml.safe_load(file.read_text())["jobs"].items()


def commands():
    return [line for _, job in jobs() for step in job["steps"] for line in step.get("run", "").splitlines()]


@pytest.mark.skipif(importlib.util.find_spec("check_jsonschema") is None, reason="check-jsonschema, of the extra dev, has the schema")
def test_workflows_are_valid():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *FILES]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_job_is_there_and_limited():
    assert FILES and {name for name, _ in jobs()} == JOBS
    for name, job in jobs():
        assert 0 < job["timeout-minutes"] <= 90, name
        assert all(("run" in step) != ("uses" in step) for step in job["steps"]), name
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step), name
    for file in FILES:
        workflow = yaml.safe_load(file.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        assert {"push", "pull_request"} <= set(workflow[True])  # YAML 1.1 reads `on` as true


def test_what_it_calls_is_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = [target for line in commands() for target in re.findall(r"\bmake ([a-z-]+)", line)]
    assert called and set(called) <= targets
    for line in commands():
        for path in re.findall(r"(?<![\w/])(?:tests|bench|\.ci)[\w./-]*", line):
            assert (ROOT / path).exists(), line


def test_every_tier_is_a_marker_and_a_target_that_is_run():
    """And `make test` has a little of it."""
    makefile = (ROOT / "Makefile").read_text()
    tiers = re.search(r"^tiers := (.*)", makefile, re.MULTILINE)[1].split()
    markers = re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(markers) >= {*tiers, "proof", "numeric", "smoke"}
    usual = re.search(r"TIERS:-([^}]*)", (ROOT / ".ci/run").read_text())[1].split()
    assert set(usual) >= {"lint", "test", "numeric", "docs", *(f"test-{tier}" for tier in tiers)}
    ran = " ".join(commands())
    tests = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    for tier in tiers:
        assert re.search(rf"^test-{tier}: ## .", makefile, re.MULTILINE) and f"test-{tier}" in ran, tier
        assert any(f"pytest.mark.{tier}\n" in text and "pytest.mark.smoke" in text for text in tests), tier
    assert set(re.findall(r"^(test-[\w-]+|test|proof|numeric):", makefile, re.MULTILINE)) <= {
        found for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() for found in re.findall(r"^\| `make ([\w-]+)`", line)
    }


def test_pythons_are_those_of_the_package():
    pythons = {version for _, job in jobs() for version in job.get("strategy", {}).get("matrix", {}).get("python", [])}
    lowest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert lowest in pythons and len(pythons) >= 3


def test_no_host_is_named():
    """An index or a registry is for whoever runs it to choose."""
    for file in [*FILES, ROOT / "Makefile", ROOT / ".ci/wheel", ROOT / "bench/gpu.sh"]:
        assert not re.search(r"https?://|\b(quay|ghcr|docker)\.io\b|\bpypi\.org\b", file.read_text()), file
