"""The host library, built once for all tests of this folder."""

import shutil

import pytest

from .build import build_module
from .host import Host

LIBRARY = ("g++", "cmake", "ninja", "nvcc")
NEEDED = {"test_install": ("g++", "cmake"), "test_torch_library": LIBRARY, "test_nvcc": LIBRARY, "test_registry": LIBRARY}


def pytest_collection_modifyitems(items):
    """Everything here is proof but one run of each operator. Where there is no C++ compiler, there is nothing to run; what is
    skipped is named in the summary."""
    for item in items:
        if "cuda_host" in item.nodeid and "test_sweep.py" not in item.nodeid:
            item.add_marker("proof")
        needed = next((tools for name, tools in NEEDED.items() if name in item.nodeid), ("g++",))
        if "cuda_host" in item.nodeid and (missing := [tool for tool in needed if shutil.which(tool) is None]):
            item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)}"))


@pytest.fixture(scope="session")
def built():
    return build_module()


@pytest.fixture
def host(built):
    return Host(built)
