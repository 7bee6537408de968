"""What an installation compiles: the libraries, the wheel, and what nvcc made of each kernel. All of it is proof, as nvcc takes its time."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from ..cuda_host.conftest import built, host  # noqa: F401, fixtures

# behind all others, so that every test finds the same cmake, which would compile everything again for another
os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
TOOLS = {"test_install": ("g++", "cmake"), "test_wheel": ()}  # the wheel's tests look for their own


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "compiled":
            item.add_marker("proof")
            needed = TOOLS.get(item.path.stem, ("g++", "cmake", "ninja", "nvcc"))
            if missing := [tool for tool in needed if shutil.which(tool) is None]:
                item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)}"))
