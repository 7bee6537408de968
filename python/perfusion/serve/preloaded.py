"""What workers and trainers need, imported once: they are forked from a process that has it, so that one that died is soon replaced."""

import diffusers  # noqa: F401
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: F401

import perfusion.serve.batching
import perfusion.serve.trainer
import perfusion.serve.worker
import perfusion.toybox.vae
import perfusion.training  # noqa: F401
