"""Our own training, with whatever an ablation changes in it; each concept is trained once and kept."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.fidelity.lab import Lab
from bench.fidelity.subjects import Target, targets
from perfusion.base import describe_base
from perfusion.training.calibrate import calibrate
from perfusion.training.data import read_pictures
from perfusion.training.session import TrainingSession
from perfusion.training_config import TrainingConfig

__all__ = ["Recipe", "concept_of", "learn_for", "saved_bytes", "session_of"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What differs from the defaults. settings: of TrainingConfig. pictures: how many, by default the target's own. masks: the renderer's.
    covariance: "captions" or "identity", a metric that knows nothing of language. noise: how timesteps are drawn: "all" alike, "late"
    (much noise: layout), "early" (little: detail), or "snr", as often as min-SNR (arXiv 2303.09556, γ = 5) weighs them. calibrated: bias
    and strength searched for at the end."""

    settings: tuple[tuple[str, Any], ...] = ()
    pictures: int | None = None
    masks: bool = True
    covariance: str = "captions"
    noise: str = "all"
    calibrated: bool = False

    @classmethod
    def of(cls, **settings: Any) -> Recipe:
        own = {field.name: settings.pop(field.name) for field in dataclasses.fields(cls)[1:] if field.name in settings}
        return cls(tuple(sorted(settings.items())), **own)


class NoiseSession(TrainingSession):
    """Training on the upper ("late") or lower ("early") two thirds of the timesteps, or on each as often as min-SNR weighs it ("snr")."""

    noise = "all"

    def _draw(self) -> Any:
        batch = super()._draw()
        return dataclasses.replace(batch, timesteps=squeezed(batch.timesteps, self.noise_scheduler, self.noise))


def squeezed(timesteps: Tensor, scheduler: Any, noise: str) -> Tensor:
    """Timesteps that were drawn alike, as `noise` would draw them."""
    total = scheduler.config.num_train_timesteps
    if noise != "snr":
        return timesteps * 2 // 3 + (total - 1 - 2 * (total - 1) // 3 if noise == "late" else 0)
    kept = scheduler.alphas_cumprod.double()
    ratio = kept / (1 - kept)
    weight = ratio.clamp(max=5) / (ratio + 1 if scheduler.config.prediction_type == "v_prediction" else ratio)
    cumulative = (weight / weight.sum()).cumsum(0)
    return torch.searchsorted(cumulative, (timesteps.cpu().double() + 0.5) / total).clamp(max=total - 1).to(timesteps)


def concept_of(lab: Lab, target: Target, recipe: Recipe) -> tuple[Path, dict[str, Any]]:
    """The concept's file, and what it cost."""
    key = {"target": dataclasses.asdict(target), "recipe": dataclasses.asdict(recipe), "steps": lab.scale.steps, "batch": lab.scale.batch}
    key["default"] = TrainingConfig(superclass="teddy", name="teddy").lasting()
    folder, facts = lab.remembered("concepts", key, lambda folder: _learn(lab, target, recipe, folder))
    return folder / "concept.safetensors", facts


def _learn(lab: Lab, target: Target, recipe: Recipe, folder: Path) -> dict[str, Any]:
    with session_of(lab, target, recipe) as session:
        memory = saved_bytes(session)
        started = time.process_time()
        while session.step < session.config.steps:
            session.train_step()
        seconds = time.process_time() - started
        concept, found = session.concept(), {}
        if recipe.calibrated:
            started = time.process_time()
            concept, report = calibrate(session)
            found = {"calibration": report.chosen, "calibration_seconds": time.process_time() - started}
    file = folder / "concept.safetensors"
    concept.save(file)
    trained = concept.value_outputs.numel() + sum(word.numel() for word in concept.word_embeddings)
    trained += 0 if concept.key_outputs is None else concept.key_outputs.numel()
    return {"seconds": seconds, "steps": session.step, "bytes": file.stat().st_size, "trained": trained, "memory": memory, **found}


def session_of(
    lab: Lab, target: Target, recipe: Recipe, kind: type[TrainingSession] = TrainingSession, *, pipe: Any = None, **changes: Any
) -> TrainingSession:
    """A training that is about to begin, of the lab's pipeline or of a copy. changes: of settings, beside the recipe's."""
    pipe = pipe or lab.pipe
    settings = {"steps": lab.scale.steps, "batch_size": lab.scale.batch, "flip": 0.0, **dict(recipe.settings), **changes}
    config = TrainingConfig(superclass=target.subject.superclass, name=target.name, **settings)
    pictures = read_pictures(
        lab.references(target, recipe.pictures, masks=recipe.masks),
        config,
        pipe.unet.config.sample_size * pipe.vae_scale_factor,
        None,
        step=4,
    )
    covariance = lab.covariance
    if recipe.covariance == "identity":
        covariance = dataclasses.replace(covariance, matrix=torch.eye(covariance.width, dtype=torch.float64), source="identity")
    if recipe.noise != "all":
        kind = type("Session", (NoiseSession,), {"noise": recipe.noise})
    return kind(pipe, describe_base(pipe), config, covariance, pictures)


def saved_bytes(session: TrainingSession) -> int:
    """What one picture's forward keeps for its backward, and four numbers for each trained one, in bytes: counted, not sampled."""
    state, step, batch = session.state(), session.step, session._draw().split(1)[0]
    total = kept_for_backward(lambda: session._learn_from(batch, session._read(batch.captions), 1.0))
    session.restore(step, state)
    return total + 16 * sum(parameter.numel() for parameter in session._trained().values())


def kept_for_backward(run: Any, own: set[int] = frozenset()) -> int:
    """Bytes that autograd saves while `run` runs, each storage once, but those of parameters."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor._base is None or not isinstance(tensor._base, torch.nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def learn_for(lab: Lab, steps: int) -> float:
    """Processor seconds of `steps` steps for each picture of a step."""
    with session_of(lab, targets()[0], Recipe(), batch_size=4) as session:
        started = time.process_time()
        for _ in range(steps):
            session.train_step()
        return (time.process_time() - started) / 4
