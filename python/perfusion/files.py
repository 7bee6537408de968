"""Files that are written in full or not at all, and sizes as people read them."""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["size_text", "user_path", "whole", "write_bytes"]

LONGEST_NAME = 255  # bytes, on nearly every file system
LONGEST_PATH = 4095  # bytes, on Linux; systems with a smaller limit say so when the file is opened


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path as people give it, with ~ expanded. ValueError for one that no file can have, where the system's own error says less."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(text := os.fspath(path), str):
        raise ValueError(f"a path must be text or a pathlib.Path, got {type(path).__name__}.")
    shown = repr(text if len(text) <= 80 else f"{text[:60]}…{text[-15:]}")
    found = os.path.expanduser(text)
    first = text.replace(os.sep, "/").split("/")[0]
    if "\0" in text:
        raise ValueError(f"the path {shown} holds a zero byte, which no file's name can. Check the path.")
    if found == text and first.startswith("~") and not os.path.lexists(first):
        raise ValueError(f"the path {shown} begins with the home of a user {first[1:]!r}, who is not known here. Check the path.")
    try:
        names = [os.fsencode(name) for name in found.replace(os.sep, "/").split("/")]
    except UnicodeEncodeError as error:
        raise ValueError(f"the path {shown} cannot be a file's name in {error.encoding}, this system's encoding. Check the path.") from None
    if max(map(len, names)) > LONGEST_NAME or sum(map(len, names)) + len(names) - 1 > LONGEST_PATH:
        raise ValueError(
            f"the path {shown} is too long: a name may have {LONGEST_NAME} bytes, and a path {LONGEST_PATH}. Check the path."
        )
    return Path(found)


def size_text(count: float) -> str:
    """Bytes as people read them: "9.71 GB", "34.2 MB", "30 KB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} KB"


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place with the same ending to write to; what is there at the end takes the name `path`, after an error nothing does.

    An OSError about that place names `path`, which is what the caller knows.
    """
    draft = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield draft
        os.replace(draft, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(draft), draft):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # of the same class: Python chooses it by the number
    finally:
        with contextlib.suppress(OSError):  # a folder that takes no file has none to remove
            draft.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """A file with these bytes, on the disk in full or not at all; missing folders are made. OSError names `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as draft, open(draft, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def whole_and_new(path: Path) -> Iterator[tuple[Path, Callable[[], Path]]]:
    """As `whole`, and never over a file: where the name is taken, the next free one of NAME-2, NAME-3, …; the function says which.

    Linking is atomic, so of two programs that write to one name at the same time each gets a name of its own.
    """
    draft, taken = path.with_name(f".{uuid.uuid4().hex}{path.suffix}"), [path]
    try:
        yield draft, lambda: taken[0]
        for number in itertools.count(1):
            taken[0] = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
            try:
                os.link(draft, taken[0])
                return
            except FileExistsError:
                continue
            except OSError:  # a file system without hard links
                try:
                    os.close(os.open(taken[0], os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                os.replace(draft, taken[0])
                return
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(draft), draft):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
