"""`perfusion.train`: the whole way from pictures to a Concept."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from perfusion import contact_sheet, memory
from perfusion.base import Base, UnsupportedPipeline, denoiser, describe_base, fingerprints_match, text_encoders
from perfusion.base.dense import quantised_layers, transposes, weight_bytes
from perfusion.base.parts import latent_multiple, plain_module, text_length
from perfusion.concept import Concept, check_name
from perfusion.covariance import Covariance, get_covariance
from perfusion.errors import advise
from perfusion.files import size_text, user_path, whole
from perfusion.termination import terminable, undisturbed
from perfusion.text import added_tokens, superclass_tokens, warn_of_unknown_word
from perfusion.training import checkpoints
from perfusion.training.calibrate import calibrate
from perfusion.training.card import write_card
from perfusion.training.data import read_pictures
from perfusion.training.folder import beginning, concept_file, numbered
from perfusion.training.log import TrainingLog
from perfusion.training.session import Measures, TrainingSession
from perfusion.training_config import TrainingConfig

__all__ = ["train"]

VALIDATION_STEPS = 20


def train(
    pipe: Any,
    images: str | Path | Sequence[Any],
    superclass: str,
    name: str,
    steps: int = TrainingConfig.steps,
    batch_size: int = TrainingConfig.batch_size,
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
    resume: a checkpoint, the bare name of one in `output`, the folder of a run, or "latest" for the newest in `output`: the
    continued run equals the uninterrupted one bit for bit on a CPU. A finished run goes on when it is given more steps.
    overwrite: replace what `output` holds of another run, each file when its replacement is there; without it nothing but a
    run's own continuation replaces a file.

    Ctrl-C, SIGTERM, SIGHUP and any error write a checkpoint before they end the run; the concept's file is written before its
    gallery and card. Raises ValueError for settings, pictures or words that cannot work
    (it says what to do), and `UnsupportedPipeline`. The pipeline is given back as it was in every case.
    """
    config = TrainingConfig(superclass=superclass, name=name, steps=steps, batch_size=batch_size, **settings)
    check_name(config.name)
    base = _check_pipeline(pipe, config)
    folder = None if output is None else user_path(output)
    checkpoint = beginning(folder, images, resume, config, overwrite)
    resolution, step = _resolution(pipe, config)
    tell = (lambda text: tqdm.write(text, file=sys.stderr)) if progress else None
    pictures = read_pictures(images, config, resolution, clipseg, step=step, tell=tell)
    if tell is not None:
        _tell_memory(pipe, config, resolution, tell)
    covariance = covariance or get_covariance(pipe, progress=progress)
    if not fingerprints_match(covariance.text_encoder, base.text_encoder):
        raise ValueError(
            "covariance: it is of another text encoder than this pipeline's. Leave it out, or compute one with `perfusion covariance`."
        )
    with TrainingSession(pipe, base, config, covariance, pictures) as session:
        session.check_prompts()
        if checkpoint is not None:
            checkpoint.check(session.facts())
            session.restore(checkpoint.step, checkpoint.tensors)
        session.concept()  # a licence that is too long, say, is refused now and not after the last step
        if folder is None:
            return _learn(session, None, progress)
        own = checkpoint is not None and checkpoint.path.resolve().parent == (folder / "checkpoints").resolve()
        stale = set() if own else set(numbered(folder))  # of the run that is overwritten
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder / "config.yaml", images=[picture.path for picture in pictures], base=str(base))
        with terminable():
            return _learn(session, folder, progress, own, stale)


def _tell_memory(pipe: Any, config: TrainingConfig, resolution: int, tell: Callable[[str], None]) -> None:
    """What training will take on its device, part by part, before it begins; and what there is."""

    def count(model: Any) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    base, model = describe_base(pipe), plain_module(denoiser(pipe))
    parts = memory.Parts(
        count(model), sum(count(encoder) for _, encoder in text_encoders(pipe)), count(pipe.vae),
        base.encoding_dim, base.outputs, resolution, pipe.vae_scale_factor, text_length(pipe),
        sum(weight_bytes(encoder) for _, encoder in text_encoders(pipe)),
    )  # fmt: skip
    texts = [functools.partial(type(encoder), encoder.config) for _, encoder in text_encoders(pipe)]
    saved = memory.saved_by_backward(
        dict(model.config), resolution // pipe.vae_scale_factor, model.dtype, texts, parts.tokens, type(model).__name__
    )
    needed = memory.training(
        parts, saved, model.dtype, rows=config.rows, batch=config.batch_size, checkpointing=config.checkpointing,
        low_memory=config.low_memory, device=pipe._execution_device.type,
    )  # fmt: skip
    there = ""
    if pipe._execution_device.type == "cuda":
        there = f"; the device has {size_text(torch.cuda.get_device_properties(pipe._execution_device).total_memory)}"
    advice = "" if config.low_memory else ". --low-memory (low_memory=True) takes less"
    tell(f"memory: {memory.table(needed)}{there}{advice}.")


def _save(concept: Concept, file: Path) -> None:
    """Write what was learned; where the folder takes no file any more, into the folder for temporary files, and say so."""
    try:
        concept.save(file)
    except OSError as error:
        rescued = Path(tempfile.gettempdir()) / f"{file.stem}-{uuid.uuid4().hex[:8]}{file.suffix}"
        with contextlib.suppress(OSError):
            concept.save(rescued)
            error.strerror = f"{error.strerror}. The concept is finished and is kept in {rescued}"
        raise


def _present(session: TrainingSession, folder: Path, concept: Concept) -> None:
    """Gallery and card beside the concept, which is saved: a failure here costs pictures and nothing that was learned."""
    config = session.config
    try:
        gallery = session.sample([prompt for prompt in config.validation_prompts for _ in range(2)], VALIDATION_STEPS)
    except Exception as error:
        _not_drawn("the gallery", error)
        gallery = []
    try:
        write_card(folder, concept, config, session.pictures, gallery, session.pipe)
    except OSError as error:
        warnings.warn(f"README.md could not be written ({error.strerror}); the concept is saved.", stacklevel=2)


def _not_drawn(what: str, error: Exception) -> None:
    reason = "out of memory" if isinstance(error, (MemoryError, torch.OutOfMemoryError)) else f"{type(error).__name__}: {error}"
    warnings.warn(f"{what} could not be drawn ({reason}); what was learned is kept.", stacklevel=3)


def _check_pipeline(pipe: Any, config: TrainingConfig) -> Base:
    """The pipeline's Base, when this name can be learned on it."""
    if getattr(pipe, "_perfusion_handle", None) is not None:
        raise ValueError("train: this pipeline is attached, and training has hooks of its own; call perfusion.detach(pipe) first.")
    base = describe_base(pipe)
    if not hasattr(pipe, "encode_prompt"):
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} is made of blocks; concepts are learned on a pipeline class of the same parts, such as "
            "StableDiffusionXLPipeline(**pipe.components), and work in both."
        )
    if "image" in inspect.signature(type(pipe).__call__).parameters:
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} starts from an image; concepts are learned on a text-to-image pipeline, and work in both. "
            "Make one of the same parts with AutoPipelineForText2Image.from_pipe(pipe)."
        )
    model = plain_module(denoiser(pipe))
    if getattr(model.config, "encoder_hid_dim_type", None) == "ip_image_proj":
        raise UnsupportedPipeline("an IP-Adapter is loaded, and training has no picture for it; call pipe.unload_ip_adapter() first.")
    if hasattr(pipe, "motion_adapter"):
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} draws videos; learn on the text-to-image pipeline its UNet comes from, and use the concept in both."
        )
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in denoiser(pipe).modules()):
        raise UnsupportedPipeline(
            "the UNet is already compiled, and hooks added after torch.compile do nothing: train first, compile then."
        )
    if getattr(pipe, "_all_hooks", None):
        raise UnsupportedPipeline("the pipeline offloads its models, which gradients do not survive; call pipe.remove_all_hooks() first.")
    for tokenizer, encoder in text_encoders(pipe):
        superclass_tokens(tokenizer, config.superclass)
        _check_gradients(encoder)
    warn_of_unknown_word(text_encoders(pipe)[0][0], config.superclass)
    if f"<{config.name}>" in {token.lower() for token in added_tokens(pipe)}:
        raise ValueError(
            f"name {config.name!r} collides: the tokenizer has a word <{config.name}> of its own (a textual inversion). "
            "Choose another name."
        )
    return base


def _check_gradients(encoder: Any) -> None:
    """UnsupportedPipeline where a text encoder has quantised layers through which the word's gradient does not come back."""
    kinds = {type(layer): (name, layer) for name, layer in quantised_layers(plain_module(encoder)).items()}
    for kind, (name, layer) in kinds.items():
        if not transposes(layer):
            raise UnsupportedPipeline(
                f"{name} of the {type(encoder).__name__} is a {kind.__module__}.{kind.__name__}, which computes no gradients, and a word "
                "is learned by those. Load the text encoder unquantised, or in 8 bits with bitsandbytes, torchao or optimum-quanto."
            )


def _resolution(pipe: Any, config: TrainingConfig) -> tuple[int, int]:
    """The side of the training square, and what sides of rectangles are multiples of, in pixels."""
    model = plain_module(denoiser(pipe))
    size = model.config.sample_size
    resolution = config.resolution or (size if isinstance(size, int) else max(size)) * pipe.vae_scale_factor
    if resolution % pipe.vae_scale_factor:
        raise ValueError(f"training: resolution must be a multiple of {pipe.vae_scale_factor}, the side of one latent, got {resolution}")
    latent = pipe.vae_scale_factor * latent_multiple(model)
    return resolution, max(latent, resolution // 8 // latent * latent) if resolution < 512 else 64


def _learn(session: TrainingSession, folder: Path | None, progress: bool, own: bool = False, stale: set[Path] | None = None) -> Concept:
    """All remaining steps, with what they write into the folder, and the concept.

    own: the folder's log is of this run. stale: another run's numbered files; those that are replaced leave the set. However
    it ends, the last whole step is in a checkpoint; a disk that is full, or a picture that cannot be drawn, does not end it.
    """
    config, facts = session.config, session.facts()
    done = session.step, session.state()  # the last step that is whole: an interrupt may come in the midst of one
    kept = None

    def keep() -> Path:
        nonlocal kept
        others = {path for path in stale if path.parent.name == "checkpoints"}
        stale.difference_update(others)  # now, for the limit counts the newest, and --resume latest takes it
        path = checkpoints.save(folder / "checkpoints", done[0], facts, done[1], config.checkpoint_limit, others)
        kept = done[0]
        return path

    def keep_if_possible() -> None:
        try:
            keep()
        except OSError as error:
            warnings.warn(f"no checkpoint could be written at step {done[0]} ({error.strerror}); training goes on.", stacklevel=2)

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
                if folder is None:
                    _show(bar, config, measures)
                    continue
                done = session.step, session.state()
                _show(bar, config, measures)
                log.write(session.step, measures, time.monotonic() - started)
                draw = config.validation_every and session.step % config.validation_every == 0
                due = config.checkpoint_every and session.step % config.checkpoint_every == 0
                if config.checkpoint_every and (due or draw or session.step == config.steps):
                    keep_if_possible()
                if draw:
                    bar.set_description(f"<{config.name}>, drawing validation pictures")
                    path = folder / "validation" / f"step-{session.step:06d}.png"
                    try:
                        log.image(session.step, _validate(session, path))
                        stale.discard(path)
                    except Exception as error:
                        _not_drawn(f"validation pictures at step {session.step}", error)
                    bar.set_description(f"<{config.name}>", refresh=False)
            concept = calibrate(session)[0] if config.calibrate else session.concept()
            if folder is not None:
                _save(concept, concept_file(folder, config.name))
                for old in stale:
                    old.unlink(missing_ok=True)
                bar.set_description(f"<{config.name}>, drawing the gallery")  # it takes a while after the last step
                _present(session, folder, concept)
            return concept
        except BaseException as error:
            if folder is not None and kept != done[0] and done[0]:
                with undisturbed():
                    _keep_on_the_way_out(keep, done[0], bar)
            elif folder is not None and kept is not None:
                bar.write(_kept(kept, folder), file=sys.stderr)
            if isinstance(error, torch.OutOfMemoryError):
                raise advise(
                    ValueError(f"training: out of memory at step {session.step + 1}: {str(error).splitlines()[0]}"),
                    python="Use low_memory=True, or a smaller micro_batch or resolution.",
                    command="Say --low-memory, or a smaller --micro-batch or --resolution.",
                ) from error
            raise


def _show(bar: Any, config: TrainingConfig, measures: Measures) -> None:
    bar.set_postfix(
        loss=f"{measures.loss:.3f}", rates=f"{config.learning_rate:g}/{config.word_learning_rate:g}",
        gate=f"{measures.gate_on_word:.2f}/{measures.gate_off_word:.2f}", refresh=False,
    )  # fmt: skip
    bar.update()


def _keep_on_the_way_out(keep: Callable[[], Path], step: int, bar: Any) -> None:
    try:
        bar.write(_kept(step, keep().parents[1]), file=sys.stderr)
    except OSError as error:
        bar.write(f"Stopped at step {step}, and no checkpoint could be written: {error.strerror}.", file=sys.stderr)


def _kept(step: int, folder: Path) -> str:
    return f"Stopped at step {step}; {folder / 'checkpoints' / f'step-{step:06d}.safetensors'} keeps it. Continue with --resume latest."


def _validate(session: TrainingSession, path: Path) -> Any:
    grid = contact_sheet.sheet(session.sample(list(session.config.validation_prompts), VALIDATION_STEPS))
    path.parent.mkdir(exist_ok=True)
    with whole(path) as draft:
        grid.save(draft)
    return grid
