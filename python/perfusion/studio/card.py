"""A concept to give away: its file, its card and pictures that it drew, in one archive."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from perfusion.contact_sheet import sheet
from perfusion.studio.painting import png

__all__ = ["archive", "card"]

_FACTS = (("superclass", "superclass"), ("family", "family of models"), ("beta", "gate: bias β"), ("tau", "gate: temperature τ"),
          ("author", "author"), ("license", "licence"), ("created", "created"), ("id", "SHA-256"))  # fmt: skip


def card(concept: Mapping[str, Any], *, with_gallery: bool) -> str:
    """Markdown with the front matter of a Hugging Face model card. concept: as docs/server.md has it."""
    name, file = concept["name"], f"{concept['name']}.safetensors"
    front = ["library_name: perfusion-kernels", "tags: [perfusion, text-to-image, diffusers]"]
    if concept.get("license"):
        front.append(f"license: {json.dumps(concept['license'])}")
    facts = [f"| {label} | {_cell(concept[key])} |" for key, label in _FACTS if concept.get(key) not in (None, "")]
    parts = [
        "---", *front, "---", f"# `<{name}>`, one {concept.get('superclass') or 'concept'}", "",
        *(["![drawn with the concept](gallery.png)", ""] if with_gallery else []),
        "A Perfusion concept (key-locked rank-one editing, arXiv 2305.01644) in one file of "
        f"{concept.get('bytes', 0):,} bytes: [{file}]({file}).", "",
        "```bash", f'perfusion generate "a photo of a <{name}>" --concept {file}', "```", "", "| | |", "|---|---|", *facts, "",
    ]  # fmt: skip
    return "\n".join(parts)


def archive(concept: Mapping[str, Any], file: bytes, gallery: Sequence[Image.Image]) -> bytes:
    """A .zip with NAME.safetensors, README.md and, if there are pictures, gallery.png: a folder that `perfusion push` uploads."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr(f"{concept['name']}/{concept['name']}.safetensors", file)
        made.writestr(f"{concept['name']}/README.md", card(concept, with_gallery=bool(gallery)))
        if gallery:
            made.writestr(f"{concept['name']}/gallery.png", png(sheet(list(gallery)[:8])))
    return buffer.getvalue()


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
