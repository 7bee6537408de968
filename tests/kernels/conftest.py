"""Triton's tests need Triton; compiled kernels are tried in host memory where that is asked for."""

import importlib.util

from . import cuda_on_host

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_triton*.py"]  # there is none for some systems

if cuda_on_host.registered():
    cuda_on_host.register()
