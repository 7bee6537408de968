"""`--calibrate`: strength and bias for a finished concept, by a short search on its own pictures.

A stronger concept explains the pictures better and leaves less to the prompt. Both are measured on the model, without any judge:

    gain    how much the masked loss on the training pictures falls below the superclass word's, at fixed noise
    drift   how far predictions for other prompts move from those with the superclass word, relative to what the prompt itself moves

Of all settings that keep `KEEP` of the largest gain, the one of least drift is taken. Bias goes into the file as its default. A strength
k has no field there: it is multiplied into what is stored, o*_V <- W_V s + k (o*_V − W_V s), and likewise into the word's embedding; the
target input is then taken anew from the moved word, so that the similarity stays 1 at the concept's own word.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perfusion.concept import Concept
from perfusion.masks import masked_loss
from perfusion.training.conditioning import noise_of

if TYPE_CHECKING:
    from perfusion.training.session import TrainingSession

__all__ = ["Calibration", "Candidate", "calibrate"]

STRENGTHS = (0.7, 0.85, 1.0)
BIASES = (0.5, 0.6, 0.7, 0.8, 0.9)
KEEP = 0.9  # of the largest gain
ROWS = 16  # draws of picture, noise and timestep
PROBES = ("a {} in the city", "a sketch of a {}", "a {} next to a house in the snow", "a small {} at night")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One setting: the masked loss on the pictures, its share of the largest gain, and its drift."""

    strength: float
    bias: float
    loss: float
    gain: float
    drift: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The setting that was taken, and all that were tried. superclass_loss: of the plain word."""

    chosen: dict[str, float]
    candidates: tuple[Candidate, ...]
    superclass_loss: float


@torch.no_grad()
def calibrate(
    session: TrainingSession, strengths: Sequence[float] = STRENGTHS, biases: Sequence[float] = BIASES, keep: float = KEEP
) -> tuple[Concept, Calibration]:
    """The session's concept with strength and bias searched for; the session goes on with them, its optimiser is not touched.

    strengths, biases: what is tried, every pair. keep: share of the largest gain that must remain, in (0, 1].
    """
    if not 0 < keep <= 1 or not strengths or not biases:
        raise ValueError(f"calibrate: keep must lie in (0, 1], and strengths and biases must not be empty, got {keep!r}")
    batch, probes = _draw(session), [probe.replace("{}", f"<{session.config.name}>") for probe in PROBES]
    learned = _Vectors.of(session)
    start = learned.scaled(session, 0.0)
    with start.used(session):
        base_loss, base, empty = _loss(session, batch, bias=None), _probe(session, batch, probes, None), _probe(session, batch, [""], None)
    moved = (base - empty).square().mean().item() + 1e-12
    found = []
    for strength in strengths:
        with learned.scaled(session, strength).used(session):
            for bias in biases:
                drift = (_probe(session, batch, probes, bias) - base).square().mean().item() / moved
                found.append((strength, bias, _loss(session, batch, bias), drift))
    most = max(base_loss - loss for _, _, loss, _ in found)
    tried = tuple(Candidate(k, bias, loss, (base_loss - loss) / most if most > 0 else 0.0, drift) for k, bias, loss, drift in found)
    best = choose(tried, keep) if most > 0 else Candidate(1.0, session.inference[0], base_loss, 0.0, 0.0)
    learned.scaled(session, best.strength).put(session)
    session.inference = (best.bias, session.inference[1])
    return session.concept(), Calibration({"strength": best.strength, "bias": best.bias}, tried, base_loss)


def choose(tried: Sequence[Candidate], keep: float) -> Candidate:
    """The least drift among those that keep enough of the gain."""
    return min((each for each in tried if each.gain >= keep), key=lambda each: (each.drift, -each.gain))


@dataclasses.dataclass(frozen=True)
class _Vectors:
    """What of a session strength moves."""

    values: Tensor
    words: tuple[Tensor, ...]
    target: Tensor

    @classmethod
    def of(cls, session: TrainingSession) -> _Vectors:
        return cls(session.value_outputs.detach().clone(), tuple(word.detach().clone() for word in session.words), session.target.clone())

    def scaled(self, session: TrainingSession, strength: float) -> _Vectors:
        """At a strength; the target is that of the moved words, as it is in the file."""
        values = torch.lerp(session.start_values, self.values, strength)
        words = tuple(torch.lerp(first, word, strength) for first, word in zip(session.start_words, self.words))
        moved = _Vectors(values, words, self.target)
        with moved.used(session):
            return dataclasses.replace(moved, target=session.settled_target())

    def put(self, session: TrainingSession) -> None:
        session.value_outputs.data.copy_(self.values)
        for word, own in zip(session.words, self.words):
            word.data.copy_(own)
        session.target = self.target.clone()

    @contextlib.contextmanager
    def used(self, session: TrainingSession) -> Iterator[None]:
        before = _Vectors.of(session)
        self.put(session)
        try:
            yield
        finally:
            before.put(session)


def _draw(session: TrainingSession) -> Any:
    """Rows that no step of training had, with timesteps spread evenly."""
    step, session.step = session.step, -1
    try:
        drawn = session._draw()
    finally:
        session.step = step
    count, total = min(ROWS, len(drawn.captions)), session.noise_scheduler.config.num_train_timesteps
    part = drawn.split(count)[0]
    spread = ((torch.arange(count) + 0.5) / count * total).long().to(part.timesteps)
    return dataclasses.replace(part, timesteps=spread)


def _predict(session: TrainingSession, batch: Any, captions: list[str], bias: float | None) -> Tensor:
    """[R, C, h, w] of the batch's noisy latents; bias None: nothing is edited, the words read as they are."""
    distinct, rows = session._distinct(captions)
    read = session._read(distinct)
    noisy = session.noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps).to(read[0].dtype)
    parts = []
    for part in torch.arange(len(rows)).split(session.config.rows):
        own = dataclasses.replace(batch, captions=[captions[row] for row in part.tolist()], timesteps=batch.timesteps[part])
        arguments = session._arguments(own, [each[rows[part]] for each in read])
        editing = contextlib.nullcontext()
        if bias is not None:
            editing = session._editing(session._text_of(read), rows[part], bias, session.inference[1])
        with editing:
            parts.append(noise_of(session._unet(noisy[part], **arguments, return_dict=False)[0], noisy.shape[1]).float())
    return torch.cat(parts)


def _loss(session: TrainingSession, batch: Any, bias: float | None) -> float:
    prediction = _predict(session, batch, batch.captions, bias)
    return masked_loss(prediction, session._goal(batch.latents, batch.noise, batch.timesteps), batch.mask).mean().item()


def _probe(session: TrainingSession, batch: Any, probes: list[str], bias: float | None) -> Tensor:
    """Predictions of the batch's noise alone, as at the beginning of a picture, for other prompts in turn."""
    captions = [probes[row % len(probes)] for row in range(len(batch.captions))]
    late = torch.full_like(batch.timesteps, session.noise_scheduler.config.num_train_timesteps - 1)
    return _predict(
        session, dataclasses.replace(batch, timesteps=late - late // 4 * (torch.arange(len(late)).to(late) % 3)), captions, bias
    )
