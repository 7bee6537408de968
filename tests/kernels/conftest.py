"""Triton's tests need Triton."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_triton*.py"]  # there is none for some systems
