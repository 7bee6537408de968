"""Files that are written in full or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["whole", "write_bytes"]


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
