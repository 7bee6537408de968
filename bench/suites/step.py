"""One step of the UNet: with a concept, attached without one, and the stock pipeline's.

Models: toybox as it is, and UNets of Stable Diffusion 1.5's and XL's shapes with random weights at small latents; with --quick
the tests' tiny pipeline. Two rows, as guidance makes them, in float32. The gate: the personalised step against the
compatibility path, which calls every projection, from equal latents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from bench.measure import Options, Problem
from bench.timing import Contestant
from perfusion.base import describe_base
from perfusion.handle import attach
from perfusion.models import load_pipeline
from tests.perfusion.editing import make_concept
from tests.perfusion.tiny import tiny_sd, tiny_sdxl
