"""The host library, built once for all tests of this folder."""

import pytest

from .build import build_module
from .host import Host


@pytest.fixture(scope="session")
def built():
    return build_module()


@pytest.fixture
def host(built):
    return Host(built)
