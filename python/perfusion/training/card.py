"""The model card of a trained concept: a README.md with a gallery beside the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from perfusion import contact_sheet
from perfusion.concept import Concept
from perfusion.training.config import TrainingConfig
from perfusion.training.data import Picture

__all__ = ["write_card"]


def write_card(folder: Path, concept: Concept, config: TrainingConfig, pictures: list[Picture], gallery: list[Any], seconds: float) -> Path:
    """Write README.md, gallery.png (sampled) and references.png (learned from) into the folder."""
    contact_sheet.sheet(gallery).save(folder / "gallery.png")
    contact_sheet.sheet([contact_sheet.image(picture.pixels) for picture in pictures]).save(folder / "references.png")
    path = folder / f"{concept.name}.safetensors"
    text = Environment(loader=PackageLoader("perfusion"), trim_blocks=True, lstrip_blocks=True).get_template("card.md").render(
        concept=concept, config=config, pictures=pictures, seconds=seconds, size=path.stat().st_size, file=path.name
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder / "README.md"
