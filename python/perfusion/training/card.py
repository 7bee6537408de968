"""The model card of a trained concept: a README.md with a gallery beside the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from perfusion import contact_sheet, models
from perfusion.concept import Concept
from perfusion.files import whole
from perfusion.training.data import Picture
from perfusion.training_config import TrainingConfig

__all__ = ["write_card"]


def write_card(
    folder: Path, concept: Concept, config: TrainingConfig, pictures: Sequence[Picture], gallery: Sequence[Any], pipe: Any
) -> Path:
    """Write README.md, gallery.png (sampled) and references.png (learned from) beside the concept's file; returns the README's path."""
    built_in = pipe.name_or_path is not None and Path(pipe.name_or_path) == models.TOYBOX
    references = [contact_sheet.image(picture.pixels) for picture in pictures]
    for name, images in (("gallery.png", gallery), ("references.png", references)):
        if not images:  # they could not be drawn
            continue
        with whole(folder / name) as draft:
            contact_sheet.sheet(images).save(draft)
    file = folder / f"{concept.name}.safetensors"
    environment = Environment(loader=PackageLoader("perfusion"), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("<", "&lt;")
    text = environment.get_template("card.md").render(
        concept=concept, config=config, pictures=pictures, gallery=bool(gallery), size=file.stat().st_size, file=file.name,
        model="toybox" if built_in else "path/to/the/base/model",  # a card is passed on: no path of this computer
    )  # fmt: skip
    with whole(folder / "README.md") as draft:
        draft.write_text(text.rstrip() + "\n", encoding="utf-8")
    return folder / "README.md"
