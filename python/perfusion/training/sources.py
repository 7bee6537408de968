"""Which file is a picture, which one its mask, which one its captions, and why a file is none of them.

    sources, unused = find_sources("photos")
    print(summary(sources, unused))     # 5 pictures, 5 with a mask, 3 with captions. Not used: ._a.png (hidden).

Every file of a folder is used, or named with the reason.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from perfusion.errors import few
from perfusion.files import user_path
from perfusion.masks import mask_rank, masked_stem
from perfusion.pictures import ENDINGS, is_picture, unreadable_kind

__all__ = ["CAPTION_ENDINGS", "Source", "find_sources", "summary"]

CAPTION_ENDINGS = (".txt", ".caption")
_SYSTEM = ("thumbs.db", "desktop.ini")
_ACCEPTED = "a folder, or a list of paths and PIL images"


@dataclasses.dataclass
class Source:
    """One training picture: its file, or a PIL image; its name in messages; and what belongs to it."""

    picture: Path | Image.Image
    name: str
    mask: Path | None = None
    captions: Path | None = None


def find_sources(images: Any) -> tuple[list[Source], list[tuple[Path, str]]]:
    """The pictures of a folder or list with their masks and captions, and every other file with the reason why it is not used.

    images: a folder, or a list of paths and PIL images; masks and caption files in a list are taken as what they are.
    A mask is named as its picture, with -masklabel, .mask, _mask or -mask before any picture's ending; captions end in .txt
    or .caption. Capitals do not matter where one file alone is meant. ValueError for anything else, with the accepted forms.
    """
    if isinstance(images, (str, os.PathLike)):
        folder = _path(images)
        if not folder.is_dir():
            raise ValueError(f"images: {str(folder)!r} is not a folder; give a folder of pictures, or a list of them.")
        given: list[Any] = sorted(folder.iterdir())
        sources, unused = _match(given, given)
        if not sources:
            named = f" {_unused(unused)}" if unused else ""
            raise ValueError(f"images: no pictures in {str(folder)!r}; looked for {', '.join(ENDINGS)}.{named}")
        return sources, unused
    given = _items(images)
    if not given:
        raise ValueError("images: the list is empty; a concept takes about 4 to 7 pictures.")
    paths = [item for item in given if isinstance(item, Path)]
    beside = [path for folder in dict.fromkeys(path.parent for path in paths) if folder.is_dir() for path in sorted(folder.iterdir())]
    sources, unused = _match(given, beside)
    if not sources:
        raise ValueError(f"images: no picture is in the list. {_unused(unused)}")
    return sources, unused


def _path(text: str | os.PathLike[str]) -> Path:
    try:
        return user_path(text)
    except ValueError as error:
        raise ValueError(f"images: {error}") from None


def _items(images: Any) -> list[Any]:
    """Paths and PIL images. ValueError for everything else."""
    if isinstance(images, Image.Image) or not isinstance(images, Iterable) or isinstance(images, (bytes, dict)) or hasattr(images, "shape"):
        more = " (one picture? put it into a list)" if isinstance(images, Image.Image) else ""
        raise ValueError(f"images: must be {_ACCEPTED}, got {type(images).__name__}{more}.")
    items = []
    for number, item in enumerate(images, start=1):
        if isinstance(item, Image.Image):
            items.append(item)
        elif isinstance(item, (str, os.PathLike)):
            items.append(_path(item))
        else:
            raise ValueError(
                f"images: item {number} is of type {type(item).__name__}; the list may hold paths and PIL images "
                "(Image.fromarray(array) makes one of a uint8 array)."
            )
    return items


def _match(given: Sequence[Any], beside: Sequence[Path]) -> tuple[list[Source], list[tuple[Path, str]]]:
    """given: what was named. beside: every file that may belong to a picture."""
    sources, others = [], []
    for number, item in enumerate(given, start=1):
        if isinstance(item, Image.Image):
            sources.append(Source(item, f"image {number}"))
        elif _is_source(item, named=given is not beside):
            sources.append(Source(item, str(item)))
        else:
            others.append(item)
    used: dict[Path, Path] = {}
    free = [path for path in beside if not path.name.startswith(".") and path.is_file()]
    for source in sources:
        if isinstance(source.picture, Path):
            near = [path for path in free if path.parent == source.picture.parent]
            source.mask = _best(source.picture.stem, [(masked_stem(path), mask_rank(path), path) for path in near])
            source.captions = _best(source.picture.stem, [(*_captioned(path), path) for path in near])
            used |= {path: source.picture for path in (source.mask, source.captions) if path is not None}
    return sources, [(path, _reason(path, sources)) for path in others if path not in used]


def _is_source(path: Path, named: bool) -> bool:
    """A picture to learn from. A file that the user named is one unless it is a sidecar: what is wrong with it is said later."""
    if path.name.startswith(".") and not (named and not path.exists()):
        return False
    if named and masked_stem(path) is None and path.suffix.lower() not in CAPTION_ENDINGS:
        return True
    return is_picture(path) and masked_stem(path) is None and (named or path.is_file())


def _captioned(path: Path) -> tuple[str | None, int]:
    """The stem of the picture that a caption file is of, and its rank: NAME.txt, NAME.caption, NAME.png.txt."""
    if path.suffix.lower() not in CAPTION_ENDINGS:
        return None, 0
    inner = Path(path.stem)
    rank = CAPTION_ENDINGS.index(path.suffix.lower())
    return (inner.stem, rank + 2) if inner.suffix.lower() in ENDINGS else (path.stem, rank)


def _best(stem: str, candidates: list[tuple[str | None, int, Path]]) -> Path | None:
    """The candidate of the picture `stem`: with the same capitals before others, then by rank."""
    fitting = [(owner != stem, rank, path) for owner, rank, path in candidates if owner is not None and owner.lower() == stem.lower()]
    return min(fitting, default=(0, 0, None))[2]


def _reason(path: Path, sources: Sequence[Source]) -> str:
    if path.name.startswith("."):
        return "hidden"
    if path.name.lower() in _SYSTEM:
        return "the system's own"
    if path.is_dir():
        return "a folder; pictures in it are not read"
    reason = unreadable_kind(path)
    if reason is not None:
        return reason
    for kind, owner in (("a mask", masked_stem(path)), ("captions", _captioned(path)[0])):
        if owner is not None:
            mine = next((s for s in sources if isinstance(s.picture, Path) and s.picture.stem.lower() == owner.lower()), None)
            if mine is None:
                rename = "; rename it if it is a picture" if kind == "a mask" else ""
                return f"by its name {kind} of {owner}, and there is no such picture{rename}"
            taken = mine.mask if kind == "a mask" else mine.captions
            return f"{Path(mine.name).name} has {kind} already, {taken.name if taken else 'elsewhere'}"
    return "neither a picture, a mask nor captions"


def summary(sources: Sequence[Source], unused: Sequence[tuple[Path, str]]) -> str:
    """One paragraph: what is used, and every file that is not, with the reason."""
    count = len(sources)
    masks, captions = (sum(getattr(source, field) is not None for source in sources) for field in ("mask", "captions"))
    parts = [f"{count} picture{'' if count == 1 else 's'}"]
    parts += [f"{masks} with a mask file"] if masks else []
    parts += [f"{captions} with captions"] if captions else []
    return ", ".join(parts) + "." + (f" {_unused(unused)}" if unused else "")


def _unused(unused: Sequence[tuple[Path, str]]) -> str:
    reasons: dict[str, list[str]] = {}
    for path, reason in unused:
        reasons.setdefault(reason, []).append(path.name)
    return f"Not used: {'; '.join(f'{few(names, 12)} ({reason})' for reason, names in reasons.items())}." if unused else ""
