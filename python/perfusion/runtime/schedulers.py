"""The schedulers of an export, in numpy: what diffusers' DDIMScheduler, PNDMScheduler and EulerDiscreteScheduler compute.

    sampler = Sampler(schedule, alphas_cumprod, steps=50)
    latents = noise * sampler.initial_scale
    for step, timestep in enumerate(sampler.timesteps):
        prediction = unet(sampler.scaled(latents, step), timestep, ...)
        latents = sampler.step(prediction, latents, step)

A sampler belongs to one batch: PNDM remembers the predictions before.
"""

from __future__ import annotations

import dataclasses

import numpy as np

__all__ = ["KINDS", "PREDICTIONS", "SPACINGS", "Schedule", "sampler"]

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which scheduler a model is sampled with, and its constants.

    kind               "ddim", "pndm" (without Runge-Kutta steps, as Stable Diffusion uses it) or "euler"
    prediction_type    what the UNet predicts: "epsilon", "v_prediction" or "sample"
    timestep_spacing   "leading", "trailing" or "linspace" (arXiv 2305.08891, table 2)
    steps_offset       added to leading timesteps
    final_alpha        cumulative alpha behind the last step
    clip_sample_range  bound of the predicted sample, or None
    """

    kind: str
    prediction_type: str
    timestep_spacing: str
    steps_offset: int
    final_alpha: float
    clip_sample_range: float | None = None


def sampler(schedule: Schedule, alphas_cumprod: np.ndarray, steps: int) -> _Sampler:
    """The sampler of one batch. alphas_cumprod [N]: of the N training timesteps. ValueError unless 1 <= steps <= N."""
    if not 1 <= steps <= len(alphas_cumprod):
        raise ValueError(f"steps must be a number from 1 to {len(alphas_cumprod)}, got {steps}")
    return KINDS[schedule.kind](schedule, np.asarray(alphas_cumprod, np.float64), steps)


class _Sampler:
    """timesteps [n]: one call of the UNet each; initial_scale: the deviation of the first latents."""

    timesteps: np.ndarray
    initial_scale = 1.0

    def __init__(self, schedule: Schedule, alphas: np.ndarray, steps: int):
        self.schedule, self.alphas, self.steps = schedule, alphas, steps
        self.timesteps = self._spaced()
        self.stride = len(alphas) // steps

    def _spaced(self) -> np.ndarray:
        """Descending timesteps, float64."""
        count, spacing = len(self.alphas), self.schedule.timestep_spacing
        if spacing == "linspace":
            return np.linspace(0, count - 1, self.steps)[::-1]
        if spacing == "leading":
            return np.arange(self.steps)[::-1] * float(count // self.steps) + self.schedule.steps_offset
        return np.arange(count, 0, -count / self.steps).round() - 1

    def scaled(self, latents: np.ndarray, step: int) -> np.ndarray:
        """The UNet's input."""
        return latents

    def step(self, prediction: np.ndarray, latents: np.ndarray, step: int) -> np.ndarray:
        """The latents after a step, from those before it and the UNet's prediction; float32."""
        raise NotImplementedError

    def _alpha(self, timestep: int) -> float:
        return self.alphas[timestep] if timestep >= 0 else self.schedule.final_alpha


class DDIM(_Sampler):
    """arXiv 2010.02502, eq. 12, with eta = 0."""

    def _spaced(self) -> np.ndarray:
        return super()._spaced().round().astype(np.int64)

    def step(self, prediction: np.ndarray, latents: np.ndarray, step: int) -> np.ndarray:
        timestep = self.timesteps[step]
        alpha, after = self._alpha(timestep), self._alpha(timestep - self.stride)
        signal, noise = alpha**0.5, (1 - alpha) ** 0.5
        if self.schedule.prediction_type == "epsilon":
            epsilon, original = prediction, (latents - noise * prediction) / signal
        elif self.schedule.prediction_type == "sample":
            epsilon, original = (latents - signal * prediction) / noise, prediction
        else:
            epsilon, original = signal * prediction + noise * latents, signal * latents - noise * prediction
        if self.schedule.clip_sample_range is not None:
            original = original.clip(-self.schedule.clip_sample_range, self.schedule.clip_sample_range)
        return (after**0.5 * original + (1 - after) ** 0.5 * epsilon).astype(np.float32)


class PNDM(_Sampler):
    """arXiv 2202.09778, the linear multistep part of it; the first step is Heun's, so there is one call more than steps."""

    def _spaced(self) -> np.ndarray:
        timesteps = super()._spaced().round().astype(np.int64)
        return np.concatenate([timesteps[:1], timesteps[1:2], timesteps[1:]])

    def step(self, prediction: np.ndarray, latents: np.ndarray, step: int) -> np.ndarray:
        timestep = self.timesteps[step]
        after = timestep - self.stride
        if step == 0:
            self._known, self._first = [], latents
        if step == 1:  # the second half of the first step
            timestep, after, latents = timestep + self.stride, timestep, self._first
        else:
            self._known = [*self._known[-3:], prediction]
        known = self._known[::-1]
        if step == 1:
            prediction = (prediction + known[0]) / 2
        elif len(known) > 1:
            weights = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}[len(known)]
            prediction = sum(weight * each for weight, each in zip(weights, known))
        return self._transfer(prediction, latents, self._alpha(timestep), self._alpha(after))

    def _transfer(self, prediction: np.ndarray, latents: np.ndarray, alpha: float, after: float) -> np.ndarray:
        """Eq. 11."""
        if self.schedule.prediction_type == "v_prediction":
            prediction = alpha**0.5 * prediction + (1 - alpha) ** 0.5 * latents
        divisor = alpha * (1 - after) ** 0.5 + (alpha * (1 - alpha) * after) ** 0.5
        return ((after / alpha) ** 0.5 * latents - (after - alpha) / divisor * prediction).astype(np.float32)


class Euler(_Sampler):
    """arXiv 2206.00364, algorithm 2 without noise added, on sigma = sqrt((1 - alpha) / alpha)."""

    def __init__(self, schedule: Schedule, alphas: np.ndarray, steps: int):
        super().__init__(schedule, alphas, steps)
        sigmas = ((1 - alphas) / alphas) ** 0.5
        self.sigmas = np.append(np.interp(self.timesteps, np.arange(len(sigmas)), sigmas), 0.0)
        largest = self.sigmas.max()
        self.initial_scale = (largest**2 + 1) ** 0.5 if schedule.timestep_spacing == "leading" else largest

    def scaled(self, latents: np.ndarray, step: int) -> np.ndarray:
        return (latents / (self.sigmas[step] ** 2 + 1) ** 0.5).astype(np.float32)

    def step(self, prediction: np.ndarray, latents: np.ndarray, step: int) -> np.ndarray:
        sigma, after = self.sigmas[step], self.sigmas[step + 1]
        if self.schedule.prediction_type == "epsilon":
            derivative = prediction
        elif self.schedule.prediction_type == "sample":
            derivative = (latents - prediction) / sigma
        else:
            original = latents / (sigma**2 + 1) - prediction * (sigma / (sigma**2 + 1) ** 0.5)
            derivative = (latents - original) / sigma
        return (latents + (after - sigma) * derivative).astype(np.float32)


KINDS = {"ddim": DDIM, "pndm": PNDM, "euler": Euler}
