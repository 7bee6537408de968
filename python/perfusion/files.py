"""Files that are written in full or not at all, and folders that can be written."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["check_writable", "whole"]


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place with the same ending to write to; what is there at the end takes the name `path`, after an error nothing does."""
    draft = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """OSError, saying what to do, unless files can be written into the folder, or it can be made. Leaves nothing behind."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    try:
        with whole(there / "probe") as draft:  # permissions alone do not tell of read-only and full disks
            draft.write_bytes(b"0")
            raise _Writable
    except _Writable:
        return
    except OSError as error:
        above = "" if there == folder.absolute() else f"{there}: "
        raise OSError(f"output: {str(folder)!r} cannot be written ({above}{error.strerror}). Give another output folder.") from error


class _Writable(Exception):
    """The probe could be written; it is not to be kept."""
