"""`perfusion.train`: the whole way from pictures to a Concept."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from perfusion import contact_sheet
from perfusion.base import describe_base, text_encoders
from perfusion.concept import Concept, check_name
from perfusion.covariance import Covariance, get_covariance
from perfusion.text import single_token
from perfusion.training import checkpoints
from perfusion.training.card import write_card
from perfusion.training.config import TrainingConfig
from perfusion.training.data import encode_pictures, read_pictures
from perfusion.training.log import TrainingLog
from perfusion.training.session import TrainingSession

__all__ = ["train"]

VALIDATION_STEPS = 20


def train(
    pipe: Any,
    images: str | Path | Sequence[Any],
    superclass: str,
    name: str,
    steps: int = 400,
    batch_size: int = 16,
    *,
    output: str | os.PathLike[str] | None = None,
    covariance: Covariance | None = None,
    clipseg: str | Path | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Concept:
    """Learn a concept from a few pictures (arXiv 2305.01644): value outputs and a word embedding, keys locked.

    pipe: a pipeline that `attach` accepts, not attached. images: a folder, or a list of paths or PIL images, 4 to 7 of them;
    captions and masks beside them are used (`perfusion.training.data.read_pictures`). superclass: the one word for what the
    thing is. name: what prompts write as <name>. settings: any field of `TrainingConfig`.
    covariance: by default `get_covariance(pipe)`. clipseg: a folder with CLIPSeg weights, for masks. output: a folder for the
    concept (NAME.safetensors), configuration, log, checkpoints, validation grids and model card; None writes nothing.
    resume: a checkpoint, or "latest" for the newest in `output`: the continued run equals the uninterrupted one bit for bit
    on a CPU.

    Ctrl-C writes a checkpoint before it ends the run. Raises ValueError for settings, pictures or words that cannot work
    (it says what to do), and `UnsupportedPipeline`. The pipeline is given back as it was in every case.
    """
    config = TrainingConfig(superclass=superclass, name=name, steps=steps, batch_size=batch_size, **settings)
    check_name(config.name)
    if "encode_prompt" in vars(pipe):  # by `attach`: training has hooks of its own
        raise ValueError("train: this pipeline is attached; call perfusion.detach(pipe) first.")
    base = describe_base(pipe)
    for tokenizer, _ in text_encoders(pipe):
        single_token(tokenizer, config.superclass)
        if f"<{config.name}>" in tokenizer.get_added_vocab():
            raise ValueError(f"name {config.name!r} collides: this tokenizer has a token <{config.name}> of its own. Choose another name.")
    folder = None if output is None else Path(output)
    checkpoint = _checkpoint(resume, folder)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if checkpoint is None and (folder / f"{config.name}.safetensors").exists():
            raise ValueError(f"{str(folder / config.name)}.safetensors exists. Give another output folder, or move the file away.")
    resolution = config.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    pictures = read_pictures(images, config, resolution, clipseg)
    covariance = covariance or get_covariance(pipe, progress=progress)
    session = TrainingSession(pipe, base, config, covariance, pictures, encode_pictures(pipe, pictures))
    try:
        session.begin()
        if checkpoint is not None:
            step, tensors = checkpoints.load(checkpoint, config)
            session.restore(tensors, step)
        seconds = _run(session, folder, progress)
        concept = session.concept(_recipe(config, len(pictures), resolution))
        if folder is not None:
            concept.save(folder / f"{config.name}.safetensors")
            config.save(folder / "config.yaml", images=[picture.path for picture in pictures], base=str(base))
            write_card(folder, concept, config, pictures, session.sample(_gallery(config), VALIDATION_STEPS, config.seed), seconds)
    finally:
        session.end()
    return concept


def _run(session: TrainingSession, folder: Path | None, progress: bool) -> float:
    """All remaining steps; returns the seconds they took."""
    config, started = session.config, time.monotonic()
    log = None if folder is None else TrainingLog(folder, config, session.step)
    bar = tqdm(total=config.steps, initial=session.step, desc=f"<{config.name}>", unit="step", disable=not progress)
    try:
        while session.step < config.steps:
            measures = session.train_step()
            bar.set_postfix(
                loss=f"{measures.loss:.3f}", rates=f"{config.learning_rate:g}/{config.word_learning_rate:g}",
                gate=f"{measures.gate_on_word:.2f}/{measures.gate_off_word:.2f}", refresh=False,
            )  # fmt: skip
            bar.update()
            if log is None:
                continue
            log.write(session.step, measures)
            if config.validation_every and session.step % config.validation_every == 0:
                grid = contact_sheet.sheet(session.sample(list(config.validation_prompts), VALIDATION_STEPS, config.seed))
                (folder / "validation").mkdir(exist_ok=True)
                grid.save(folder / "validation" / f"step-{session.step:06d}.png")
                log.image(session.step, grid)
            if config.checkpoint_every and session.step % config.checkpoint_every == 0:
                checkpoints.save(folder / "checkpoints", config, session.step, session.state())
    except KeyboardInterrupt:
        if folder is not None:
            path = checkpoints.save(folder / "checkpoints", config, session.step, session.state())
            bar.write(f"Stopped at step {session.step}; {path} keeps it. Continue with resume=\"latest\" (--resume latest).")
        raise
    finally:
        bar.close()
        if log is not None:
            log.close()
    return time.monotonic() - started


def _checkpoint(resume: str | Path | None, folder: Path | None) -> Path | None:
    if resume is None:
        return None
    if str(resume) != "latest":
        return Path(resume)
    if folder is None:
        raise ValueError('resume="latest" needs an output folder to look in.')
    found = checkpoints.latest(folder / "checkpoints")
    if found is None:
        raise ValueError(f"there is no checkpoint to continue from in {str(folder / 'checkpoints')!r}.")
    return found


def _gallery(config: TrainingConfig) -> list[str]:
    return [prompt for prompt in config.validation_prompts for _ in range(2)]


def _recipe(config: TrainingConfig, pictures: int, resolution: int) -> dict[str, Any]:
    """What is worth knowing of a training in the few bytes that a concept file has for it."""
    return {
        "steps": config.steps, "batch": config.batch_size, "lr": config.learning_rate, "word_lr": config.word_learning_rate,
        "bias": config.bias, "temperature": config.temperature, "pictures": pictures, "resolution": resolution, "seed": config.seed,
    }  # fmt: skip
