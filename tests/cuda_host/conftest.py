"""The host library, built once for all tests of this folder."""

import shutil

import pytest

from .build import build_module
from .host import Host


def pytest_collection_modifyitems(items):
    """Everything here is proof but one run of each operator. Where there is no C++ compiler, there is nothing to run."""
    for item in items:
        if item.path.parent.name == "cuda_host":
            if item.path.name != "test_sweep.py":
                item.add_marker("proof")
            if shutil.which("g++") is None:
                item.add_marker(pytest.mark.skip(reason="needs g++"))


@pytest.fixture(scope="session")
def built():
    return build_module()


@pytest.fixture
def host(built):
    return Host(built)
