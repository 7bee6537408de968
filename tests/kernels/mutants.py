"""Deliberate faults: a module with one piece of its source replaced, executed under another name.

A check is a function of the module that fails on wrong results; it has to pass with the module as it is. No fault may write
beyond a tensor: that would not end with its test.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def mutant(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{module.__name__} must have {old!r} once; it has it {source.count(old)} times"
    file = folder / f"{module.__name__.rpartition('.')[2]}_mutant.py"
    file.write_text(source.replace(old, new), encoding="utf-8")
    name = f"{module.__package__}.{file.stem}"  # in the package, so that its relative imports work
    spec = importlib.util.spec_from_file_location(name, file)
    changed = importlib.util.module_from_spec(spec)
    sys.modules[name] = changed
    try:
        spec.loader.exec_module(changed)
    finally:
        del sys.modules[name]
    return changed


def assert_killed(check: Callable[[ModuleType], None], module: ModuleType, old: str, new: str, folder: Path) -> None:
    """The check passes with the module as it is, and fails with `old` replaced by `new`."""
    check(module)
    changed = mutant(module, old, new, folder)
    with pytest.raises(AssertionError):
        check(changed)
