"""Compiles csrc/ with g++ for the CPU, once per state of the sources, into build/cuda_host.

The sources may be changed on the way: `Change` replaces one text of one file, which must be there exactly once.
"""

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pybind11
import torch

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "cuda_host"
ATTENTION = ("edited_attention", "fused_edited_attention")
KERNELS = (
    "concept_gates.cu",
    "device_errors.cu",
    "edited_projection.cu",
    "edited_projection_backward.cu",
    "limits.cu",
    *(f"{name}{part}.cu" for name in ATTENTION for part in ("", "_float16", "_bfloat16")),
)
PLAIN = ("status.cpp", "host/block.cpp", "host/cache.cpp", "host/copies.cpp", "host/fiber.cpp", "host/warp.cpp")
TORCH = Path(torch.__file__).parent
PYTHON = ("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"])
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique")


@dataclass(frozen=True)
class Change:
    file: str  # in csrc/
    old: str
    new: str
    operator: str = ""  # whose sources alone see the change, "" for all: the others need not be compiled again


def only_widths(*widths: int) -> tuple[Change, ...]:
    """The changes that leave these head widths alone, for builds that need no others."""
    file = "attention_widths.h"
    lines = [line for line in (ROOT / "csrc" / file).read_text().splitlines() if line.startswith("  CASE(")]
    return tuple(Change(file, line, "  \\") for line in lines if int(line.split("(")[1].split(")")[0]) not in widths)


def build(
    name: str, *mains: str, flags: tuple[str, ...] = (), named: tuple[str, ...] = (), link: tuple[str, ...] = (),
    changes: tuple[Change, ...] = (),
) -> Path:  # fmt: skip
    """Compiles and links csrc/ with `mains`, in tests/cuda_host or by their path from the root, into a file `name` -> its path.

    An object is compiled once per state of its source, of what that includes, and of the flags. `flags` are for every file, but for
    csrc/host/ not -fsanitize=thread: the scheduler speaks to it itself. `named` are for csrc/torch/.
    """
    texts, others = _texts(changes), _texts(tuple(change for change in changes if not change.operator))
    operators = [change.operator for change in changes]
    sources = [f"csrc/{file}" for file in (*KERNELS, *PLAIN)] + [main if "/" in main else f"tests/cuda_host/{main}" for main in mains]
    commands = {}
    for source in sources:
        own = [f for f in flags if not (source.startswith("csrc/host/") and f == "-fsanitize=thread")]
        if source.endswith("/binding.cpp"):
            own += PYTHON
        if source.startswith("csrc/example/"):
            own += ["-DPERFUSION_HOST", f"-I{ROOT}/csrc/include"]
        if source.startswith("csrc/torch/"):
            own += [*named, "-DPERFUSION_HOST", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(TORCH / "include")]
        tree = "changed" if all(Path(source).name.startswith(operator) for operator in operators) else "others"
        seen = texts if tree == "changed" else others
        state = [(file, seen[file]) for file in sorted(_included(source, seen))]
        commands[source] = ["g++", *FLAGS, *own, "-x", "c++", "-c", source], _digest(state, FLAGS, own), tree
    folder = BUILD / f"{name.split('.')[0]}-{_digest(*commands.values(), flags, link)}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / name).exists():
            _compile(folder, name, {"changed": texts, "others": others}, commands, [*flags, *link])
    return folder / name


def _texts(changes: tuple[Change, ...]) -> dict[str, str]:
    """Every source by its path from the root, changed."""
    folders = (ROOT / "csrc", Path(__file__).parent)
    paths = [p for folder in folders for p in folder.rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".cpp")]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    for change in changes:
        text = texts[f"csrc/{change.file}"]
        assert text.count(change.old) == 1, f"{change.file} has {text.count(change.old)} times: {change.old}"
        texts[f"csrc/{change.file}"] = text.replace(change.old, change.new)
    return texts


def _included(file: str, texts: dict[str, str]) -> set[str]:
    """`file`, and every source that it includes by a relative path, directly or not."""
    found = {file}
    for name in re.findall(r'^#include "([^"]+)"', texts[file], re.MULTILINE):
        path = os.path.normpath(os.path.join(os.path.dirname(file), name))
        if path in texts and path != "csrc/device/cuda.cuh":  # which g++ does not see
            found |= _included(path, texts)
    return found


def _digest(*state) -> str:
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def _compile(
    folder: Path, name: str, trees: dict[str, dict[str, str]], commands: dict[str, tuple[list[str], str, str]], link: list[str]
) -> None:
    for tree, texts in trees.items():
        for file, text in texts.items():
            (folder / tree / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / tree / file).write_text(text)

    def compile_one(source: str) -> str:
        command, state, tree = commands[source]
        result = BUILD / "objects" / f"{Path(source).name}-{state}.o"
        if not result.exists():
            result.parent.mkdir(exist_ok=True)
            part = f"{result}.{os.getpid()}"
            _run(folder / tree, *command, "-o", part)
            os.rename(part, result)
        return str(result)

    with ThreadPoolExecutor(2) as pool:
        # changed ones first: of a template that several files instantiate, the linker takes the first
        objects = list(pool.map(compile_one, sorted(commands, key=lambda source: commands[source][2] != "changed")))
    _run(folder, "g++", *link, *objects, "-o", f"{name}.part")
    (folder / f"{name}.part").rename(folder / name)


def _run(folder: Path, *command: str) -> None:
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, f"{' '.join(command)}\n{ran.stderr[-4000:]}"


def build_module(changes: tuple[Change, ...] = ()):
    """The pybind11 module over the host library, changed so."""
    path = build("perfusion_host.so", "binding.cpp", link=("-shared", "-Wl,-Bsymbolic"), changes=changes)
    # by its full name pybind11 knows a module again, and must not: another build is another
    return _import(f"{path.parent.name}.perfusion_host", path)


def _import(name: str, path: Path):
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def build_torch_library(overload: str = "host") -> Path:
    """csrc/torch over the host library: kernels of `perfusion_kernels::<operator>.<overload>` for tensors in host memory."""
    mains = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "torch").glob("*.cpp"))
    libraries = (f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10")
    named = (f'-DPERFUSION_OVERLOAD="{overload}"',)
    return build(f"perfusion_torch_{overload}.so", *mains, named=named, link=("-shared", "-Wl,-Bsymbolic,--no-as-needed", *libraries))
