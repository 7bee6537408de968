"""Every file of a folder is used, or named with the reason."""

import pathlib
import warnings

import numpy
import pytest
import torch
from PIL import Image

from perfusion.training.data import read_pictures
from perfusion.training.sources import find_sources, summary
from tests.perfusion.learning import settings

CONFIG = settings(instance_prompts="a {}")
pytestmark = pytest.mark.filterwarnings("ignore:.*few. a concept takes", "ignore:pictures smaller than half")


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def found(images):
    sources, unused = find_sources(images)
    return (
        {pathlib.Path(s.name).name: (s.mask and s.mask.name, s.captions and s.captions.name) for s in sources},
        {path.name: reason for path, reason in unused},
    )


@pytest.mark.parametrize("ending", ["-masklabel.png", "-masklabel.PNG", "-MaskLabel.png", "-masklabel.jpg", "_mask.png", "-mask.webp", ".mask.tif"])
def test_a_mask_is_a_mask_however_it_is_written(tmp_path, ending):
    folder = touch(tmp_path, "a.jpg", f"a{ending}")
    assert found(folder) == ({"a.jpg": (f"a{ending}", None)}, {})


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "A.txt", "a.jpg.txt"])
def test_captions_are_captions_however_they_are_written(tmp_path, name):
    assert found(touch(tmp_path, "a.jpg", name)) == ({"a.jpg": (None, name)}, {})


def test_what_is_not_used_is_named_with_the_reason(tmp_path):
    folder = touch(
        tmp_path / "in", "a.png", "a-masklabel.png", "a_mask.png", "a.txt", "a.caption", "b_mask.png", "c.txt", "._a.png", ".DS_Store",
        "Thumbs.db", "notes.md", "photo.nef",
    )  # fmt: skip
    (folder / "more").mkdir()
    used, unused = found(folder)
    assert used == {"a.png": ("a-masklabel.png", "a.txt")}
    assert unused == {
        "a_mask.png": "a.png has a mask already, a-masklabel.png",
        "a.caption": "a.png has captions already, a.txt",
        "b_mask.png": "by its name a mask of b, and there is no such picture; rename it if it is a picture",
        "c.txt": "by its name captions of c, and there is no such picture",
        "._a.png": "hidden",
        ".DS_Store": "hidden",
        "Thumbs.db": "the system's own",
        "notes.md": "neither a picture, a mask nor captions",
        "photo.nef": "a raw photo: develop it to JPEG or PNG",
        "more": "a folder; pictures in it are not read",
    }
    told = summary(*find_sources(folder))
    assert told.startswith("1 picture, 1 with a mask file, 1 with captions. Not used: ") and ".DS_Store, ._a.png (hidden)" in told
    assert all(name in told for name in unused)


def test_files_that_differ_in_capitals_alone_keep_their_owners(tmp_path):
    folder = touch(tmp_path, "a.png", "A.png", "a.txt", "A.txt", "A_mask.png")
    assert found(folder) == ({"A.png": ("A_mask.png", "A.txt"), "a.png": ("A_mask.png", "a.txt")}, {})


@pytest.mark.parametrize("pattern", ["*.png", "*"])
def test_a_list_with_masks_and_captions_among_the_pictures(tmp_path, pattern):
    folder = touch(tmp_path, "a.png", "b.png", "a-masklabel.png", "b_mask.png", "c_mask.png", "a.txt", "._b.png")
    used, unused = found(list(folder.glob(pattern)))
    assert used == {"a.png": ("a-masklabel.png", "a.txt"), "b.png": ("b_mask.png", None)} and set(unused) == {"c_mask.png", "._b.png"}


def test_a_picture_from_memory_takes_no_file_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(touch(tmp_path, "image 1.txt", "image 1-masklabel.png"))
    (picture,) = read_pictures([Image.new("RGB", (16, 16))], CONFIG, 16)
    assert picture.captions == ("a {}",) and picture.mask is None


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (Image.new("RGB", (4, 4)), r"must be a folder, or a list of paths and PIL images, got Image \(one picture. put it into a list\)"),
        (numpy.zeros((2, 4, 4, 3)), "must be a folder, or a list .*got ndarray"),
        (torch.zeros(2, 3, 4, 4), "must be a folder, or a list .*got Tensor"),
        (7, "got int"),
        (None, "got NoneType"),
        (b"x", "got bytes"),
        ({"a.png": 1}, "got dict"),
        ([numpy.zeros((4, 4, 3))], r"item 1 is of type ndarray; .* \(Image.fromarray"),
        ([Image.new("RGB", (4, 4)), ("a.png", "a caption")], "item 2 is of type tuple"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_anything_else_is_refused_with_the_accepted_forms(images, message):
    with pytest.raises(ValueError, match=f"images: .*{message}"):
        read_pictures(images, CONFIG, 16)


def test_one_warning_or_one_paragraph(tmp_path):
    touch(tmp_path, "notes.md", "._a.png")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    with pytest.warns(UserWarning) as told:
        read_pictures(tmp_path, CONFIG, 16)
    assert sum("Not used" in str(each.message) for each in told) == 1
    paragraphs = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Not used")
        read_pictures(tmp_path, CONFIG, 16, tell=paragraphs.append)
    assert paragraphs == ["images: 1 picture. Not used: ._a.png (hidden); notes.md (neither a picture, a mask nor captions)."]


def test_a_folder_with_pictures_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"no pictures in .*; looked for .png, .*Not used: a.nef \(a raw photo"):
        find_sources(touch(tmp_path, "a.nef"))
