"""`perfusion.train`: the whole way from pictures to a Concept."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from perfusion import contact_sheet
from perfusion.base import Base, UnsupportedPipeline, describe_base, fingerprints_match, text_encoders
from perfusion.concept import Concept, check_name
from perfusion.covariance import Covariance, get_covariance
from perfusion.files import whole
from perfusion.text import added_tokens, single_token
from perfusion.training import checkpoints
from perfusion.training.card import write_card
from perfusion.training.config import TrainingConfig
from perfusion.training.data import read_pictures
from perfusion.training.folder import beginning, concept_file, numbered
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
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Concept:
    """Learn a concept from a few pictures (arXiv 2305.01644): value outputs and a word embedding, keys locked.

    pipe: a text-to-image pipeline that `attach` accepts, not attached. images: a folder, or a list of paths or PIL images,
    4 to 7 of them; captions and masks beside them are used (`perfusion.training.data.read_pictures`). superclass: the one
    word for what the thing is. name: what prompts write as <name>. settings: any field of `TrainingConfig`.
    covariance: by default `get_covariance(pipe)`. clipseg: a folder with CLIPSeg weights, for masks. output: a folder for the
    concept (NAME.safetensors), configuration, log, checkpoints, validation grids and model card; None writes nothing.
    resume: a checkpoint, or "latest" for the newest in `output`: the continued run equals the uninterrupted one bit for bit
    on a CPU. A finished run goes on when it is given more steps. overwrite: replace what `output` holds of another run, each
    file when its replacement is there; without it nothing but a run's own continuation replaces a file.

    Ctrl-C writes a checkpoint before it ends the run. Raises ValueError for settings, pictures or words that cannot work
    (it says what to do), and `UnsupportedPipeline`. The pipeline is given back as it was in every case.
    """
    config = TrainingConfig(superclass=superclass, name=name, steps=steps, batch_size=batch_size, **settings)
    check_name(config.name)
    base = _check_pipeline(pipe, config)
    folder = None if output is None else Path(output)
    checkpoint = beginning(folder, images, resume, config, overwrite)
    pictures = read_pictures(images, config, _resolution(pipe, config), clipseg)
    covariance = covariance or get_covariance(pipe, progress=progress)
    if not fingerprints_match(covariance.text_encoder, base.text_encoder):
        raise ValueError(
            "covariance: it is of another text encoder than this pipeline's. Leave it out, or compute one with `perfusion covariance`."
        )
    with TrainingSession(pipe, base, config, covariance, pictures) as session:
        if checkpoint is not None:
            checkpoint.check(session.facts())
            session.restore(checkpoint.step, checkpoint.tensors)
        session.concept()  # a licence that is too long, say, is refused now and not after the last step
        if folder is None:
            _learn(session, None, progress)
            return session.concept()
        own = checkpoint is not None and checkpoint.path.resolve().parent == (folder / "checkpoints").resolve()
        stale = set() if own else set(numbered(folder))  # of the run that is overwritten
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder / "config.yaml", images=[picture.path for picture in pictures], base=str(base))
        gallery = _learn(session, folder, progress, own, stale)
        concept = session.concept()
        concept.save(concept_file(folder, config.name))
        write_card(folder, concept, config, pictures, gallery, pipe)
        for old in stale:
            old.unlink(missing_ok=True)
    return concept


def _check_pipeline(pipe: Any, config: TrainingConfig) -> Base:
    """The pipeline's Base, when this name can be learned on it."""
    if getattr(pipe, "_perfusion_handle", None) is not None:
        raise ValueError("train: this pipeline is attached, and training has hooks of its own; call perfusion.detach(pipe) first.")
    base = describe_base(pipe)
    if "image" in inspect.signature(type(pipe).__call__).parameters:
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} starts from an image; concepts are learned on a text-to-image pipeline, and work in both. "
            "Make one of the same parts with AutoPipelineForText2Image.from_pipe(pipe)."
        )
    if pipe.unet.config.encoder_hid_dim_type is not None:
        raise UnsupportedPipeline("an IP-Adapter is loaded, and training has no picture for it; call pipe.unload_ip_adapter() first.")
    if hasattr(pipe, "motion_adapter"):
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} draws videos; learn on the text-to-image pipeline its UNet comes from, and use the concept in both."
        )
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in pipe.unet.modules()):
        raise UnsupportedPipeline(
            "the UNet is already compiled, and hooks added after torch.compile do nothing: train first, compile then."
        )
    if getattr(pipe, "_all_hooks", None):
        raise UnsupportedPipeline("the pipeline offloads its models, which gradients do not survive; call pipe.remove_all_hooks() first.")
    for tokenizer, _ in text_encoders(pipe):
        single_token(tokenizer, config.superclass)
    if f"<{config.name}>" in {token.lower() for token in added_tokens(pipe)}:
        raise ValueError(
            f"name {config.name!r} collides: the tokenizer has a word <{config.name}> of its own (a textual inversion). "
            "Choose another name."
        )
    return base


def _resolution(pipe: Any, config: TrainingConfig) -> int:
    size = pipe.unet.config.sample_size
    resolution = config.resolution or (size if isinstance(size, int) else max(size)) * pipe.vae_scale_factor
    if resolution % pipe.vae_scale_factor:
        raise ValueError(f"training: resolution must be a multiple of {pipe.vae_scale_factor}, the side of one latent, got {resolution}")
    return resolution


def _learn(session: TrainingSession, folder: Path | None, progress: bool, own: bool = False, stale: set[Path] | None = None) -> list[Any]:
    """All remaining steps, with what they write into the folder; returns the gallery, drawn at the end, where there is a folder.

    own: the folder's log is of this run. stale: another run's numbered files; those that are replaced leave the set.
    """
    config, facts = session.config, session.facts()
    done = session.step, session.state()  # the last step that is whole: an interrupt may come in the midst of one

    def keep(step: int, state: dict[str, Any]) -> Path:
        others = {path for path in stale if path.parent.name == "checkpoints"}
        stale.difference_update(others)  # now, for the limit counts the newest, and --resume latest takes it
        return checkpoints.save(folder / "checkpoints", step, facts, state, config.checkpoint_limit, others)

    with contextlib.ExitStack() as stack:
        log = None
        if folder is not None:  # before the bar, which would draw over a warning
            log = TrainingLog(folder, config, session.step, session.device, keep=own)
            stack.enter_context(contextlib.closing(log))
        bar = stack.enter_context(
            tqdm(total=config.steps, initial=session.step, desc=f"<{config.name}>", unit="step", disable=not progress)
        )
        try:
            while session.step < config.steps:
                started = time.monotonic()
                measures = session.train_step()
                bar.set_postfix(
                    loss=f"{measures.loss:.3f}", rates=f"{config.learning_rate:g}/{config.word_learning_rate:g}",
                    gate=f"{measures.gate_on_word:.2f}/{measures.gate_off_word:.2f}", refresh=False,
                )  # fmt: skip
                bar.update()
                if folder is None:
                    continue
                log.write(session.step, measures, time.monotonic() - started)
                if config.validation_every and session.step % config.validation_every == 0:
                    path = folder / "validation" / f"step-{session.step:06d}.png"
                    bar.set_description(f"<{config.name}>, drawing validation pictures")
                    log.image(session.step, _validate(session, path))
                    bar.set_description(f"<{config.name}>", refresh=False)
                    stale.discard(path)
                done = session.step, session.state()
                if config.checkpoint_every and (session.step % config.checkpoint_every == 0 or session.step == config.steps):
                    keep(*done)
            if folder is None:
                return []
            bar.set_description(f"<{config.name}>, drawing the gallery")  # it takes a while after the last step
            return session.sample([prompt for prompt in config.validation_prompts for _ in range(2)], VALIDATION_STEPS)
        except KeyboardInterrupt:
            if folder is not None:
                path = keep(*done)
                bar.write(f"Stopped at step {done[0]}; {path} keeps it. Continue with --resume latest.", file=sys.stderr)
            raise


def _validate(session: TrainingSession, path: Path) -> Any:
    grid = contact_sheet.sheet(session.sample(list(session.config.validation_prompts), VALIDATION_STEPS))
    path.parent.mkdir(exist_ok=True)
    with whole(path) as draft:
        grid.save(draft)
    return grid
