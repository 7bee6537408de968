"""What the package as a whole promises: a quiet import, few dependencies, arrows in one direction."""

import ast
import os
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


TORCH_ALONE = """
import sys
sys.modules.update(dict.fromkeys(("platformdirs", "triton")))  # None: importing them raises ImportError
import torch
import perfusion_kernels
query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 3, 2, 8)
for backend in (None, "reference"):
    perfusion_kernels.edited_attention(query, key, key, backend=backend)
reasons = {status.name: status.reason for status in perfusion_kernels.available_backends()}
assert reasons["triton"] and not reasons["reference"], reasons
"""


def test_the_reference_needs_torch_alone():
    """Tuning's cache is found by platformdirs, and Triton's kernels need triton: neither is imported before."""
    path = os.pathsep.join(filter(None, sys.path))
    ran = subprocess.run([sys.executable, "-c", TORCH_ALONE], env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_one_basename_per_operator():
    for name in perfusion_kernels.schemas.SCHEMAS:
        assert (ROOT / f"{name}.py").exists() and (ROOT / "reference" / f"{name}.py").exists()


def test_public_names_are_documented():
    for name in perfusion_kernels.__all__:
        assert getattr(perfusion_kernels, name).__doc__, name
