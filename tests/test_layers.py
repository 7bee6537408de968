"""Which folder may use what: csrc, then perfusion_kernels, then python/perfusion; arrows run one way.

Read from the sources, so an import inside a function counts too.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names)
PACKAGES = {  # folder -> what it may import beside the standard library and itself
    "perfusion_kernels": {"torch", "triton", "platformdirs"},
    "python/perfusion": {
        *("perfusion_kernels", "torch", "diffusers", "transformers", "tokenizers", "accelerate", "safetensors", "huggingface_hub"),
        *("PIL", "jinja2", "markdown", "numpy", "onnx", "onnxruntime", "onnxscript", "platformdirs", "tqdm", "typer", "yaml"),
        *("optimum", "peft", "pillow_heif"),  # where they are installed
        *("fastapi", "fsspec", "prometheus_client", "pydantic", "pydantic_core", "sqlalchemy", "starlette", "uvicorn"),  # of serve/
        *("gradio", "httpx", "ray"),  # of studio/ and serve/deployment.py, where they are installed
    },
    "python/perfusion/runtime": {"PIL", "numpy", "onnxruntime", "perfusion", "safetensors", "tokenizers"},  # no torch
}


def modules(path: Path) -> Iterator[str]:
    """Every module that a file imports by its full name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


@pytest.mark.parametrize("folder", PACKAGES)
def test_a_package_imports_only_what_its_layer_may(folder):
    name = Path(folder).name
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in files
        for module in modules(path)
        if module.split(".")[0] not in STANDARD | PACKAGES[folder] | {name}
    }
    assert not wrong


@pytest.mark.parametrize("folder", PACKAGES)
def test_relative_imports_stay_inside(folder):
    """`from ... import x` must not climb out of its package."""
    for path in (ROOT / folder).rglob("*.py"):
        depth = len(path.relative_to(ROOT / folder).parts)
        levels = [node.level for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert max(levels, default=0) <= depth, path


def test_the_wrapper_uses_the_operators_public_names():
    """Only `__all__` of perfusion_kernels and of its public modules is an interface."""
    import perfusion_kernels

    for path in (ROOT / "python/perfusion").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "perfusion_kernels":
                public = node.module in ("perfusion_kernels", "perfusion_kernels.metric")
                assert public, f"{path}: {node.module}"
                names = {alias.name for alias in node.names}
                assert node.module != "perfusion_kernels" or names <= set(perfusion_kernels.__all__), f"{path}: {names}"


INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)', re.MULTILINE)
TORCH = re.compile(r"^(torch|ATen|c10|caffe2)/|^pybind11/|^Python\.h$")
STABLE = re.compile(r"^torch/(csrc/stable|csrc/inductor/aoti_torch/c|headeronly)/")


def wrong_includes(name: str, text: str) -> list[str]:
    """Includes that a file of this name in csrc/ may not have: stable torch in torch/, and none elsewhere."""
    found = [header for header in INCLUDE.findall(text) if TORCH.search(header)]
    return [header for header in found if not (name.startswith("torch/") and STABLE.search(header))]


def test_kernels_see_no_torch():
    wrong = {
        f"{path.relative_to(ROOT)}: {header}"
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cu", ".cuh", ".h", ".cpp")
        for header in wrong_includes(str(path.relative_to(ROOT / "csrc")), path.read_text(encoding="utf-8"))
    }
    assert not wrong


@pytest.mark.parametrize(
    ("name", "line", "allowed"),
    [
        ("a.cu", "#include <cuda_bf16.h>", True),
        ("a.cu", "#include <torch/extension.h>", False),
        ("a.cuh", '  # include "ATen/ATen.h"', False),
        ("a.h", "#include <torch/csrc/stable/tensor.h>", False),
        ("a.cpp", "#include <torch/csrc/stable/tensor.h>", False),
        ("torch/a.cpp", "#include <torch/csrc/stable/tensor.h>", True),
        ("torch/a.h", "#include <torch/headeronly/core/ScalarType.h>", True),
        ("torch/a.cpp", "#include <torch/torch.h>", False),
        ("torch/a.cpp", "#include <Python.h>", False),
    ],
)
def test_the_rule_for_includes(name, line, allowed):
    assert (wrong_includes(name, f"#pragma once\n{line}\n") == []) is allowed


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import perfusion_kernels", {"perfusion", "diffusers", "transformers", "torch._dynamo"}),
        ("import perfusion", {"perfusion_kernels", "torch", "numpy", "diffusers", "transformers"}),
        ("import perfusion; perfusion.Concept; perfusion.attach", {"diffusers", "transformers"}),
        ("import perfusion.runtime", {"perfusion_kernels", "torch", "diffusers", "transformers", "onnxruntime"}),
    ],
)
def test_importing_loads_no_more_than_it_must(code, absent):
    loaded = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}; import sys; print(*sys.modules)"],
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert (loaded.returncode, loaded.stderr) == (0, "")
    assert not absent & set(loaded.stdout.split())


def test_no_source_uses_managed_memory():
    """What a kernel reads or flags must not migrate between host and device while others use it."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".cpp", ".h")]
    assert len(sources) > 30
    wrong = [path for path in sources if re.search(r"cudaMallocManaged|__managed__|cudaMemPrefetch", path.read_text(encoding="utf-8"))]
    assert not wrong
