"""Without a GPU, Triton's kernels are executed by its interpreter, which has to be said before Triton is imported."""

import importlib.util
import os
import sys

import torch

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_triton*.py"]  # there is none for some systems

if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "Triton was imported before its interpreter could be asked for"
    os.environ["TRITON_INTERPRET"] = "1"
