"""What the package as a whole promises: a quiet import, few dependencies, arrows in one direction."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import perfusion_kernels

ROOT = Path(perfusion_kernels.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def test_import_is_quiet_and_builds_nothing():
    code = (
        "import sys, torch, perfusion_kernels;assert not torch.cuda.is_initialized() and 'perfusion' not in sys.modules"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    """torch and the standard library; Triton in its folder only; the reference knows torch and itself alone."""
    found = set(imports(path))
    allowed = set(sys.stdlib_module_names) | {"torch"}
    folder = path.parent.name
    if folder == "triton":
        allowed.add("triton")
    if path.name == "user_cache.py":
        allowed.add("platformdirs")  # where a system keeps caches
    if folder == "reference":
        allowed = {"torch", "typing"}
        assert not any(name.startswith("..") for name in found)
    assert {name for name in found if not name.startswith(".")} <= allowed


def test_one_basename_per_operator():
    for name in perfusion_kernels.schemas.SCHEMAS:
        assert (ROOT / f"{name}.py").exists() and (ROOT / "reference" / f"{name}.py").exists()


def test_public_names_are_documented():
    for name in perfusion_kernels.__all__:
        assert getattr(perfusion_kernels, name).__doc__, name
