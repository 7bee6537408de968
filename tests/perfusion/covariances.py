"""What the tests of the covariance share: a pipeline whose encodings fill every direction, and its covariance without a bar.

    covariance = compute(trained_sd(), captions)
"""

from __future__ import annotations

import torch

from perfusion.covariance import compute_covariance
from tests.perfusion.tiny import tiny_sd


def final_norm(encoder) -> torch.nn.LayerNorm:
    return next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))


def trained_sd(dtype=torch.float64, seed=0):
    """A tiny pipeline whose last layer norm is not the identity.

    With scale 1 and bias 0, as initialised, every encoding sums to 0 and C is singular whatever the captions say.
    """
    pipe = tiny_sd(seed=seed)
    norm, generator = final_norm(pipe.text_encoder), torch.Generator().manual_seed(seed)
    norm.weight.copy_(1 + 0.3 * torch.randn(16, generator=generator))
    norm.bias.copy_(0.5 * torch.randn(16, generator=generator))
    return pipe.to(dtype)


def compute(pipe, captions, **options):
    return compute_covariance(pipe, captions, **{"progress": False, **options})
