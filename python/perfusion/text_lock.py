"""`TextLock`: whoever uses tokenizers and text encoders waits for others that use the same ones."""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["TextLock"]

_LOCKS: Any = weakref.WeakKeyDictionary()  # tokenizer or text encoder -> (its number, its lock)
_MAKING, _NUMBERS = threading.Lock(), itertools.count()


class TextLock:
    """The locks of a pipeline's tokenizers and text encoders; `with lock.held():`. A thread that holds them may take them again.

    A tokenizer keeps padding and truncation in itself, so two threads in one tokenizer get texts of each other's length. Pipelines share
    some parts and not others (the refiner of SDXL has one of its two text encoders), so each part has a lock of its own, and all of a
    pipeline's are taken in the order in which they were made: no two threads wait for each other.
    """

    def __init__(self, parts: Iterable[Any]):
        with _MAKING:
            found = [_LOCKS.setdefault(part, (next(_NUMBERS), threading.RLock())) for part in parts]
        self._locks = [lock for _, lock in sorted(found, key=lambda each: each[0])]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for lock in self._locks:
                stack.enter_context(lock)
            yield
