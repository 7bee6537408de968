"""Everything is in pyproject.toml. Building looks for no GPU and downloads nothing of its own.

The CUDA sources in csrc/ are built by CMake and not registered with torch yet, so the wheel is pure Python. When they are,
they are compiled here if nvcc is found, and the build says so if it is not.
"""

from setuptools import setup

setup()
