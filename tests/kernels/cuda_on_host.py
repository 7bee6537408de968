"""The compiled kernels as a backend for tensors in host memory, so that what holds for a backend is tried with them where there is no GPU.

    PERFUSION_CUDA_ON_HOST=FILE pytest tests/kernels -k cuda        what every backend must do
    PERFUSION_CUDA_ON_HOST=FILE pytest tests/perfusion              pipelines and training, with compiled gates

FILE is the library of csrc/torch over csrc/host/, with its operators' overloads named "cuda" (tests/cuda_host/build.py).
"""

import os
from pathlib import Path

from perfusion_kernels import backend, cuda
from perfusion_kernels.cuda import library, supports

SHARED_MEMORY = 232448  # bytes of a block


def registered() -> bool:
    return "PERFUSION_CUDA_ON_HOST" in os.environ


def register() -> None:
    """Everything stays as it is, but for what asks for a device."""
    library.LIBRARY = Path(os.environ["PERFUSION_CUDA_ON_HOST"])
    library.loaded()
    library.shared_memory, supports.anywhere = lambda index: SHARED_MEMORY, lambda *arguments: None
    backend._unavailable["cuda"] = lambda: None
    cuda.register_all()
