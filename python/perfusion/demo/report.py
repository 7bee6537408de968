"""The demo's report: one HTML page with its pictures inside, to be opened or sent as it is."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from PIL import Image

from perfusion.files import whole

__all__ = ["write_report"]


def write_report(
    output: Path,
    learned: Sequence[Any],
    pairs: Mapping[str, Mapping[str, Any]],
    pictures: Mapping[str, Sequence[Image.Image]],
    **facts: Any,
) -> Path:
    """Write report.html and scores.json into the folder; returns the path of the page. pictures: by the place where the page shows them."""
    environment = Environment(loader=PackageLoader("perfusion"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "inline": inline}
    columns = [field.name for field in dataclasses.fields(next(iter(learned[0].scores.values())))]
    page = environment.get_template("demo.html").render(learned=learned, pairs=pairs, pictures=pictures, columns=columns, **facts)
    scores = {each.subject.name: {title: dataclasses.asdict(row) for title, row in each.scores.items()} for each in learned}
    scores |= {prompt: {title: dataclasses.asdict(row) for title, row in rows.items()} for prompt, rows in pairs.items()}
    for name, content in (("report.html", page.rstrip() + "\n"), ("scores.json", json.dumps(scores, indent=2, ensure_ascii=False) + "\n")):
        with whole(output / name) as draft:
            draft.write_text(content, encoding="utf-8")
    return output / "report.html"


def inline(picture: Image.Image) -> str:
    """The picture as a data URL."""
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def duration(seconds: float) -> str:
    """In words: seconds below two minutes, then minutes."""
    number, unit = (seconds, "second") if seconds < 120 else (seconds / 60, "minute")
    return f"{number:.0f} {unit}{'' if round(number) == 1 else 's'}"
