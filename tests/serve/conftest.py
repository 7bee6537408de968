"""A model that draws in milliseconds, concepts for it, and one server of it for all tests that need not harm one."""

import hashlib
from pathlib import Path

import httpx
import pytest

from perfusion import models
from perfusion.captions import everyday_captions
from perfusion.covariance import compute_covariance
from perfusion.serve import Settings, running
from tests.stand_in import save_concept, save_model

CONCEPTS = ("teddy", "teapot", "cup", "cat")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with `model` and NAME.safetensors of the concepts above."""
    folder = tmp_path_factory.mktemp("serve")
    save_model(folder / "model")
    for number, name in enumerate(CONCEPTS):
        save_concept(folder / f"{name}.safetensors", name, seed=number)
    with pytest.warns(UserWarning, match="covariance of"):  # of few captions
        compute_covariance(models.load_pipeline(folder / "model"), everyday_captions(300), progress=False).save(
            folder / "model" / "covariance.safetensors"
        )
    return folder


@pytest.fixture(scope="session")
def digests(world):
    return {name: hashlib.sha256((world / f"{name}.safetensors").read_bytes()).hexdigest() for name in CONCEPTS}


@pytest.fixture(scope="session")
def settings_of(world):
    """Settings of a server of the small model."""

    def make(folder, **more):
        return Settings(**{**dict(models={"toybox": str(world / "model")}, folder=folder, port=0, devices=("cpu",)), **more})

    return make


@pytest.fixture(scope="session")
def url(settings_of, tmp_path_factory):
    """The address of a server that all tests share, with no key: whoever asks is `local`."""
    with running(settings_of(tmp_path_factory.mktemp("shared") / "state", pixels=64 * 64, most_steps=20, body=2**20)) as url:
        yield url


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


@pytest.fixture
def teddy(http, world):
    """The shared server has the teddy."""
    answer = http.post("/v1/concepts", files={"file": (world / "teddy.safetensors").read_bytes()})
    assert answer.status_code in (201, 409), answer.text
    return "teddy"


@pytest.fixture
def survived(request):
    """survived(FAULT, OUTCOME, TIMES): what this test did, what it saw come of it, how often. bench/serve_faults.py makes a table of it."""

    def record(fault, outcome, times=1):
        for name, value in (("fault", fault), ("outcome", outcome), ("times", times)):
            request.node.user_properties.append((name, value))

    return record
