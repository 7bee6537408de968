"""The output folder of a training: what it holds already, and whether this run may write there."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from perfusion.concept import Concept
from perfusion.files import user_path
from perfusion.training import checkpoints
from perfusion.training.checkpoints import Checkpoint
from perfusion.training_config import TrainingConfig, read_settings
from perfusion.writable import check_writable

__all__ = ["beginning", "concept_file", "numbered"]

_CARD = ("README.md", "gallery.png", "references.png")  # what only a finished run writes
_COURSE = ("config.yaml", "log.jsonl")
_NUMBERED = re.compile(r"checkpoints/step-\d+\.safetensors|validation/step-\d+\.png|tensorboard/events\.out\.tfevents\..*")


def concept_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def numbered(folder: Path) -> list[Path]:
    """Checkpoints, validation pictures and curves. Those of two runs cannot be told apart by their names."""
    return [path for path in sorted(folder.glob("*/*")) if _NUMBERED.fullmatch(path.relative_to(folder).as_posix())]


def beginning(folder: Path | None, images: Any, resume: str | Path | None, config: TrainingConfig, overwrite: bool) -> Checkpoint | None:
    """The checkpoint to continue from, or None for a new run. Nothing is written.

    ValueError when the run would replace files that are not its own (unless `overwrite`), or has nothing left to do; OSError
    for a folder that cannot be written and a checkpoint that is not there.
    """
    if folder is not None and isinstance(images, (str, Path)) and folder.resolve() == user_path(images).resolve():
        raise ValueError(f"output: {str(folder)!r} is the folder of the training pictures; give another one.")
    checkpoint, own = _checkpoint(folder, resume, config)
    if folder is not None:
        _check_free(folder, config, own, overwrite)
        check_writable(folder)
    return checkpoint


def _checkpoint(folder: Path | None, resume: str | Path | None, config: TrainingConfig) -> tuple[Checkpoint | None, bool]:
    """The checkpoint to continue from, and whether it is one of this folder's."""
    if resume is None:
        return None, False
    if str(resume) == "latest":
        if folder is None:
            raise ValueError('resume="latest" needs an output folder to look in.')
        path = _newest_whole(folder / "checkpoints")
        if path is None:
            file = concept_file(folder, config.name)
            done = f", and {str(file)!r} is finished" if file.exists() else ""
            raise ValueError(f"there is no checkpoint to continue from in {str(folder / 'checkpoints')!r}{done}.")
    else:
        path = _named(folder, resume)
    checkpoint = checkpoints.load(path)
    if checkpoint.step > config.steps:
        raise ValueError(f"checkpoint {str(path)!r} is of step {checkpoint.step}, beyond the {config.steps} steps of this training.")
    own = folder is not None and path.resolve().parent == (folder / "checkpoints").resolve()
    finished = own and checkpoint.step == config.steps and _came_to(checkpoint, file := concept_file(folder, config.name))
    if finished and not config.calibrate and _has_card(folder, file):  # the card comes last; a finished run may be calibrated later
        raise ValueError(f"nothing is left to do: {str(file)!r} has had all {config.steps} steps. Give more steps to go on from there.")
    return checkpoint, own


def _named(folder: Path | None, resume: str | Path) -> Path:
    """The checkpoint that a path means: a file, the folder of a run or of checkpoints, or a bare name of one in this folder."""
    path = user_path(resume)
    if path.is_dir():
        newest = _newest_whole(path / "checkpoints") or _newest_whole(path)
        if newest is None:
            raise ValueError(f"there is no checkpoint to continue from in {str(path)!r}.")
        return newest
    if path.exists() or folder is None:
        return path
    here = folder / "checkpoints"
    number = re.fullmatch(r"(?:(?:step|checkpoint)-)?(\d+)(?:\.safetensors)?", str(resume))
    names = [f"step-{int(number[1]):06d}.safetensors"] if number else [path.name, f"{path.name}.safetensors"]
    found = next((here / name for name in names if path.parent == Path() and (here / name).is_file()), None)
    if found is None:
        there = ", ".join(each.stem for each in checkpoints.all_of(here)) or "none"
        raise FileNotFoundError(f"no such checkpoint: {path}. In {str(here)!r} there are: {there}.")
    return found


def _newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is not damaged; the newest one where all are, so that its damage is told of."""
    every = checkpoints.all_of(folder)
    for path in reversed(every):
        try:
            checkpoints.load(path)
        except ValueError as error:
            if path != every[0]:
                warnings.warn(f"{error} The one before it is taken.", stacklevel=2)
            continue
        return path
    return every[-1] if every else None


def _has_card(folder: Path, file: Path) -> bool:
    """Whether the README is of this concept, and not of one that it replaced."""
    try:
        return Concept.load(file).created in (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _check_free(folder: Path, config: TrainingConfig, own: bool, overwrite: bool) -> None:
    """ValueError, naming them, when the folder holds files that this run would write and that are not its own."""
    if overwrite:
        return
    file = concept_file(folder, config.name)
    if own:  # of a run that is going on, the card is its own once its concept is there
        taken = [] if file.exists() else [folder / name for name in _CARD if (folder / name).exists()]
    else:
        taken = [path for path in (file, *(folder / name for name in (*_CARD, *_COURSE))) if path.exists()] + numbered(folder)
    if not taken:
        return
    names = dict.fromkeys(path.name if path.parent == folder else f"{path.parent.name}/" for path in taken)
    whose, further = ("", "") if own else _whose(folder, config.name)
    holds = f"holds {whose}, and this run would replace its" if whose else "holds files that this run would replace:"
    options = ["Give another output folder", further, "say --overwrite (overwrite=True)"]
    raise ValueError(f"output: {str(folder)!r} {holds} {', '.join(names)}. {', or '.join(filter(None, options))}.")


def _whose(folder: Path, name: str) -> tuple[str, str]:
    """Whose run a folder holds and how far it came, and how a run of `name` may go on with it; "" where nothing says so."""
    newest = checkpoints.latest(folder / "checkpoints")
    try:
        checkpoint = None if newest is None else checkpoints.load(newest)
        owner = read_settings(folder / "config.yaml").get("name") if checkpoint is None else checkpoint.facts.get("name")
    except (OSError, ValueError):  # somebody else's files, or damaged ones
        return "", ""
    if not isinstance(owner, str):
        return "", ""
    file = concept_file(folder, owner)
    if checkpoint is None:
        return (f"a {'finished' if file.exists() else 'stopped'} run of <{owner}>", "")
    goes_on = 'go on with it by --resume latest (resume="latest")' if owner == name else ""
    if _came_to(checkpoint, file):
        return f"a finished run of <{owner}>, step {checkpoint.step}", f"{goes_on} and more steps" if goes_on else ""
    return f"a run of <{owner}> that was not finished and stopped at step {checkpoint.step}", goes_on


def _came_to(checkpoint: Checkpoint, file: Path) -> bool:
    """Whether the concept in `file` is what training had learned at the checkpoint."""
    try:
        values = Concept.load(file).value_outputs
    except (OSError, ValueError):
        return False
    learned = checkpoint.tensors.get("value_outputs")
    return learned is not None and torch.equal(learned.half(), values.half())  # the file is in half precision
