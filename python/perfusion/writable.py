"""Whether a folder can be written, found out before the work whose result is to go there."""

from __future__ import annotations

import os
from pathlib import Path

from perfusion.files import whole

__all__ = ["check_writable", "file_for_folder"]


def check_writable(folder: Path) -> None:
    """OSError, saying what to do, unless files can be written into the folder, or it can be made. Leaves nothing behind."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    try:
        with whole(there / "probe") as draft:  # permissions alone do not tell of read-only and full disks
            draft.write_bytes(b"0")
            raise _Writable
    except _Writable:
        return
    except NotADirectoryError:
        raise NotADirectoryError(file_for_folder(there)) from None
    except OSError as error:
        above = "" if there == folder.absolute() else f"{there}: "
        raise OSError(f"output: {str(folder)!r} cannot be written ({above}{error.strerror}). Give another output folder.") from error


def file_for_folder(path: Path) -> str | None:
    """What is wrong where a file has a name that a folder needs, as in picture.png/other.png; None where none has."""
    file = next((part for part in (path, *path.parents) if part.is_file()), None)
    return file and f"{file} is a file, and a folder is needed there. Choose another path, or move that file away."


class _Writable(Exception):
    """The probe could be written; it is not to be kept."""
