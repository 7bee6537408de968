"""Prints the lowest versions that pyproject.toml allows, one requirement a line: of the package itself and of its extra `test`.

    python .ci/lower_bounds.py > build/lower.txt && pip install --constraint build/lower.txt -e '.[test]'
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lower_bounds(extras: tuple[str, ...] = ("test",)) -> Iterator[str]:
    """`torch==2.10` for `torch>=2.10`, of the dependencies and of these extras, with the extras that they name."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    waiting, seen = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)], set()
    while waiting:
        for requirement in waiting.pop(0):
            own = re.fullmatch(rf"{project['name']}\[([\w,]+)\]", requirement)
            if own:
                waiting += (project["optional-dependencies"][extra] for extra in own[1].split(","))
            elif requirement not in seen:
                seen.add(requirement)
                name, bound, marker = re.fullmatch(r"([\w.-]+)>=([\w.]+)\s*(;.*)?", requirement).groups()
                yield f"{name}=={bound}{marker or ''}"


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in lower_bounds())
