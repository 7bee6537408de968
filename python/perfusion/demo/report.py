"""The demo's report, in Markdown and as a page that needs nothing beside its pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import markdown
from jinja2 import Environment, PackageLoader

from perfusion.files import whole

__all__ = ["write_report"]

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Perfusion demo</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
  img { max-width: 100%; image-rendering: pixelated; border: 1px solid #ddd; }
  table { border-collapse: collapse; } th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
  th:first-child, td:first-child { text-align: left; } code { background: #f4f4f4; padding: 0 .2rem; }
</style>
"""


def write_report(output: Path, learned: Sequence[Any], pairs: Mapping[str, Mapping[str, Any]], **facts: Any) -> Path:
    """Write report.md and report.html into the folder; returns the path of the first."""
    columns = [field.name for field in dataclasses.fields(next(iter(learned[0].scores.values())))]
    environment = Environment(loader=PackageLoader("perfusion"), trim_blocks=True, lstrip_blocks=True)
    environment.filters["duration"] = duration
    text = environment.get_template("demo.md").render(learned=learned, pairs=pairs, columns=columns, **facts).rstrip() + "\n"
    # a concept's <name> would be a tag: the template writes it as code, which both kinds of page show as it is
    body = markdown.markdown(text, extensions=["tables", "fenced_code"])
    for name, content in (("report.md", text), ("report.html", f"{_PAGE}{body}\n</html>\n")):
        with whole(output / name) as draft:
            draft.write_text(content, encoding="utf-8")
    return output / "report.md"


def duration(seconds: float) -> str:
    """In words: seconds below two minutes, then minutes."""
    number, unit = (seconds, "second") if seconds < 120 else (seconds / 60, "minute")
    return f"{number:.0f} {unit}{'' if round(number) == 1 else 's'}"
