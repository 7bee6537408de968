"""The compiled kernels as a backend for tensors in host memory, so that what holds for a backend is tried with them where there is no GPU.

    PERFUSION_CUDA_ON_HOST=FILE pytest tests/kernels -k cuda        what every backend must do
    PERFUSION_CUDA_ON_HOST=FILE pytest tests/perfusion              pipelines and training, with compiled gates

FILE is the library of csrc/torch over csrc/host/, with its operators' overloads named "cuda" (tests/cuda_host/build.py).
"""

import ctypes
import functools
import os

import torch

from perfusion_kernels import backend, cuda
from perfusion_kernels.cuda import library, refusals

DEVICE = (2, 232448)  # multiprocessors, and bytes of shared memory of a block


def registered() -> bool:
    return "PERFUSION_CUDA_ON_HOST" in os.environ


def register() -> None:
    """Refusals stay as they are, but for those that ask for a device."""
    torch.ops.load_library(os.environ["PERFUSION_CUDA_ON_HOST"])
    library.loaded = functools.cache(lambda: ctypes.CDLL(os.environ["PERFUSION_CUDA_ON_HOST"]))  # whom check_device asks
    library.loaded()
    refusals.anywhere, refusals.limits = lambda *arguments: None, lambda index: DEVICE
    backend._unavailable["cuda"] = lambda: None
    cuda.register_all()
