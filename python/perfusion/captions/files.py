"""Captions out of files of your own: text, JSON lines or CSV, one after the other."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from perfusion.files import user_path

__all__ = ["read_captions"]


def read_captions(path: str | Path) -> Iterator[str]:
    """The captions of a file, one after the other, never the whole file in memory.

    path: `.txt`, one caption per line; `.jsonl`, one object per line with "text" or "caption"; `.csv` with a header that
    names a column "caption" or "text". UTF-8 (a byte order mark is fine). Empty lines and empty captions are passed over.
    Raises FileNotFoundError, and ValueError with the file and line for another file type, text that is not UTF-8, a line
    that does not parse, a missing column, or a file without any caption. Errors inside the file appear while iterating.
    """
    path = user_path(path)
    readers = {".txt": _text_lines, ".jsonl": _json_lines, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} is not one of {', '.join(readers)}")
    if not path.is_file():
        raise FileNotFoundError(f"no such file of captions: {path}")
    return _captions_of(path, readers[path.suffix.lower()])


def _captions_of(path: Path, reader) -> Iterator[str]:
    empty = True
    with path.open("rb") as file:
        for caption in reader(path, _decoded(path, file)):
            if caption := " ".join(caption.split()):
                empty = False
                yield caption
    if empty:
        raise ValueError(f"{path} holds no caption")


def _decoded(path: Path, file) -> Iterator[str]:
    """Lines with their ends. Decoding line by line is what lets an error name its line."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            at = f"byte {error.start + 1} of the line is 0x{line[error.start]:02x}"
            raise ValueError(f"{path}, line {number} is not UTF-8 text ({at}); save it as UTF-8") from error


def _text_lines(path: Path, lines: Iterator[str]) -> Iterator[str]:
    return lines


def _json_lines(path: Path, lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        caption = row.get("text", row.get("caption")) if isinstance(row, dict) else None
        if not isinstance(caption, str):
            raise ValueError(f'{path}, line {number} has no string under "text" or "caption"')
        yield caption


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[str]:
    rows = csv.DictReader(lines, strict=True)
    try:
        columns = {(name or "").strip().lower(): name for name in rows.fieldnames or ()}
        column = columns.get("caption", columns.get("text"))
        if column is None:
            raise ValueError(f'{path} has no column "caption" or "text", only {sorted(columns)}')
        for row in rows:
            yield row[column] or ""
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from error
