"""Everything is in pyproject.toml. Building looks for no GPU and downloads nothing of its own.

There are no CUDA sources yet, so the wheel is pure Python. When there are, they are compiled here if nvcc is found, and
the build says so if it is not.
"""

from setuptools import setup

setup()
