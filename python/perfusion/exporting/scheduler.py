"""A diffusers scheduler as a `Schedule` of the runtime."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from perfusion.exporting.checks import ExportError
from perfusion.runtime.schedulers import PREDICTIONS, SPACINGS, Schedule

__all__ = ["read_schedule"]

KINDS = {"DDIMScheduler": "ddim", "PNDMScheduler": "pndm", "EulerDiscreteScheduler": "euler"}
# options that change what is computed, with the value at which they change nothing
IDLE = {
    "thresholding": False, "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero", "skip_prk_steps": True,
    "sigma_min": None, "sigma_max": None,
}  # fmt: skip


def read_schedule(scheduler: Any, kind: str | None = None) -> tuple[Schedule, np.ndarray]:
    """The schedule and alphas_cumprod [N] float32 of a diffusers scheduler.

    kind: "ddim", "pndm" or "euler" to sample the model with instead, from the scheduler's constants. ExportError when the
    exported program has no such scheduler.
    """
    import diffusers

    if kind is not None:
        names = {each: name for name, each in KINDS.items()}
        if kind not in names:
            raise ExportError(f"scheduler must be one of {', '.join(names)}, got {kind!r}")
        same = kind == KINDS.get(type(scheduler).__name__)
        options = {} if same else {"set_alpha_to_one": False, "clip_sample": False, "skip_prk_steps": True}  # as Stable Diffusion's
        scheduler = getattr(diffusers, names[kind]).from_config(scheduler.config, **options)
    name, config = type(scheduler).__name__, scheduler.config
    advice = 'Export with scheduler="ddim" (--scheduler ddim): DDIM on the same constants.'
    if name not in KINDS:
        raise ExportError(f"a {name} cannot be exported; supported are {', '.join(KINDS)}. {advice}")
    known = inspect.signature(type(scheduler)).parameters  # a configuration keeps the options of the scheduler it came from
    for option, idle in IDLE.items():
        if option in known and config.get(option, idle) != idle:
            raise ExportError(f"a {name} with {option}={config[option]!r} cannot be exported. {advice}")
    for option, supported in {"prediction_type": PREDICTIONS, "timestep_spacing": SPACINGS}.items():
        if config[option] not in supported:
            raise ExportError(f"a {name} with {option}={config[option]!r} cannot be exported; supported are {', '.join(supported)}.")
    alphas = scheduler.alphas_cumprod.numpy().astype(np.float32)
    schedule = Schedule(
        kind=KINDS[name],
        prediction_type=config.prediction_type,
        timestep_spacing=config.timestep_spacing,
        steps_offset=config.steps_offset,
        final_alpha=float(getattr(scheduler, "final_alpha_cumprod", alphas[0])),
        clip_sample_range=float(config.clip_sample_range) if config.get("clip_sample", False) else None,
    )
    return schedule, alphas
