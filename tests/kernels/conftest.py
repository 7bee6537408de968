"""Triton's tests need Triton."""

import importlib.util
import os

from .interpreter import patch_interpreter

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_triton*.py"]  # there is none for some systems

if os.environ.get("TRITON_INTERPRET") == "1":
    patch_interpreter()
