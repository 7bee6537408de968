"""The table of choices made by measurement: which of two ways was faster, at which shape, on which kind of device.

Its rows come from choices.json beside this file, which bench/choices.py makes from benchmarks on GPUs, and from the
user's cache, which `measure_choices` writes; the user's own count before the others. A way is taken only where it was
asked for, because the two round differently, and only where its row is: a shape that nobody measured stays as it was. A
row chooses between right implementations, so whatever a file holds, no result becomes wrong.

Source: DESIGN.md, "Choices by measurement".
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import torch

from . import user_cache
from .arguments import FLOATING

SIZES = {"edited_projection": ("B", "T", "D", "O"), "cross_attention_layer": ("B", "N", "C", "T", "H", "d")}
OUTCOMES = {"edited_projection": ("cuda", "library"), "cross_attention_layer": ("absorbed", "plain")}  # the second: without a win
MARGIN = 0.97  # of the other's time, in the median, is a win; what is closer may be chance
SHIPPED = Path(__file__).with_name("choices.json")
LARGEST = 4 * 2**20  # bytes of a file: tens of thousands of rows


def won(ratio: float | None) -> bool:
    """Whether the first of `OUTCOMES` is taken that needed `ratio` of the second's time."""
    return ratio is not None and ratio <= MARGIN


@dataclass(frozen=True)
class Choice:
    """A row of the table.

    ratio: time of the first of `OUTCOMES` over that of its fastest rival, `against`; the median over `rounds`. None: it was not
        timed, because it failed or its result was wrong, which `against` then says.
    date, torch, commit: when, and with which versions, it was measured; commit is empty where it is not known.
    """

    device: str  # kind of device, as `user_cache.kind` names it
    operator: str
    dtype: str  # as "bfloat16"
    sizes: dict[str, int]
    choice: str
    ratio: float | None
    against: str
    rounds: int
    date: str
    torch: str
    commit: str = ""

    @property
    def key(self) -> tuple:
        return self.device, self.operator, self.dtype, tuple(self.sizes.values())

    @property
    def why(self) -> str:
        compared = self.against if self.ratio is None else f"takes {self.ratio:.2f} times as long as {self.against}"
        return f"{OUTCOMES[self.operator][0]} {compared}"

    def __str__(self) -> str:
        sizes = ", ".join(f"{letter} = {size}" for letter, size in self.sizes.items())
        return f"{self.operator} {self.dtype} {sizes}: {self.choice}; {self.why}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem(row: object) -> str | None:
    """Why a row of a file is none, or None."""
    kinds = {field.name: field.type for field in fields(Choice)}
    if not isinstance(row, dict) or row.keys() != kinds.keys():
        return f"it must be an object of {', '.join(kinds)}"
    for name, kind in kinds.items():
        if kind in (str, int) and type(row[name]) is not kind:
            return f"{name} must be {'a text' if kind is str else 'a whole number'}"
    if row["operator"] not in SIZES:
        return f"operator must be {' or '.join(SIZES)}"
    letters = SIZES[row["operator"]]
    sizes = row["sizes"]
    if not isinstance(sizes, dict) or sorted(sizes) != sorted(letters) or any(type(size) is not int for size in sizes.values()):
        return f"sizes must be whole numbers {', '.join(letters)}"
    if row["dtype"] not in map(dtype_name, FLOATING):
        return f"dtype must be {' or '.join(map(dtype_name, FLOATING))}"
    if row["ratio"] is not None and (type(row["ratio"]) not in (int, float) or not 0 < row["ratio"] < LARGEST):
        return "ratio must be a number above 0, or null"
    expected = OUTCOMES[row["operator"]][not won(row["ratio"])]
    return None if row["choice"] == expected else f"choice must be {expected}, by its ratio"


def read(file: Path) -> tuple[list[Choice], list[str]]:
    """The rows of a file, and why it or some of them are passed over. No file: neither."""
    try:
        if not file.exists():
            return [], []
        if not file.is_file() or file.stat().st_size > LARGEST:
            raise ValueError(f"it must be a file of at most {LARGEST} bytes")
        rows = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise ValueError("it must hold a list")
    except (OSError, ValueError, RecursionError) as error:
        return [], [f"{file} is passed over: {error}"]
    reasons = [f"row {number} of {file} is passed over: {why}" for number, row in enumerate(rows) if (why := problem(row))]
    right = [row for row in rows if problem(row) is None]
    return [Choice(**{**row, "sizes": {each: row["sizes"][each] for each in SIZES[row["operator"]]}}) for row in right], reasons


def users(device_kind: str) -> Path:
    """The user's file for a kind of device and this version of torch, whose library is one of the two ways."""
    return user_cache.path(f"choices-{torch.__version__}", device_kind)


@cache
def known(device_kind: str) -> tuple[tuple[Choice, ...], tuple[str, ...]]:
    """The rows for a kind of device, one for each shape, and why others are passed over."""
    shipped, users_own = read(SHIPPED), read(users(device_kind))
    rows = {row.key: row for row in (*shipped[0], *users_own[0]) if row.device == device_kind}
    return tuple(rows.values()), (*shipped[1], *users_own[1])


def keep(rows: Iterable[Choice]) -> None:
    """Writes rows into the user's files, in place of those for the same shapes there."""
    rows = list(rows)
    for device_kind in {row.device for row in rows}:
        file = users(device_kind)
        mine = {row.key: row for row in (*read(file)[0], *rows) if row.device == device_kind}
        user_cache.write(file, [asdict(row) for row in mine.values()])
    known.cache_clear()
    _table.cache_clear()


def measured(operator: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> str | None:
    """What the table says, one of `OUTCOMES`; None where it has no row. A compiled function keeps what it was traced with."""
    if not torch.compiler.is_compiling():
        return _table(operator, device, dtype).get(sizes)
    for each, choice in _constant_table(operator, device.type, device.index, dtype):  # sizes may be symbols, which have no hash
        if each == sizes:
            return choice
    return None


@cache
def _table(operator: str, device: torch.device, dtype: torch.dtype) -> dict[tuple[int, ...], str]:
    rows, _ = known(user_cache.kind(device))
    return {tuple(row.sizes.values()): row.choice for row in rows if (row.operator, row.dtype) == (operator, dtype_name(dtype))}


@torch.compiler.assume_constant_result
def _constant_table(operator: str, device_type: str, index: int | None, dtype: torch.dtype) -> tuple:
    return tuple(_table(operator, torch.device(device_type, index), dtype).items())
