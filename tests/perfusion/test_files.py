"""Files are written in full or not at all, and an error names the file that was asked for."""

import errno
from pathlib import Path

import pytest
import torch

from perfusion.base import describe_base
from perfusion.files import whole
from perfusion.training import checkpoints
from tests.perfusion.editing import make_concept
from tests.perfusion.learning import covariance_of
from tests.perfusion.tiny import tiny_sd


def text(path):
    with whole(path) as draft:
        draft.write_text("a" * 9000)


def checkpoint(path):
    checkpoints.save(path.parent, 1, {}, {"a": torch.zeros(9000)}, 1)


@pytest.fixture(params=["text", "covariance", "concept", "checkpoint"])
def write(request):
    writers = {
        "text": lambda: text,
        "covariance": lambda: covariance_of(tiny_sd()).save,
        "concept": lambda: make_concept(describe_base(tiny_sd())).save,
        "checkpoint": lambda: checkpoint,
    }
    return writers[request.param]()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "step-000001.safetensors"


def refused(write, path):
    """Number and file of the error, after which nothing else is in the folder."""
    there = list(path.parent.iterdir())
    with pytest.raises(OSError) as error:
        write(path)
    assert list(path.parent.iterdir()) == there
    return error.value.errno, Path(error.value.filename)


def test_in_place_of_a_folder(write, path):
    path.mkdir()
    assert refused(write, path) == (errno.EISDIR, path)


def test_where_there_is_no_room(write, path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        assert refused(write, path) == (errno.EFBIG, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_another_error_inside_stays_what_it_is(path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), whole(path):
        Path("elsewhere").read_bytes()
