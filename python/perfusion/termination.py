"""SIGTERM and SIGHUP as exceptions, so that what is being worked on is kept: Ctrl-C has always been one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["Terminated", "terminable", "undisturbed"]

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Terminated(KeyboardInterrupt):
    """The process was asked to end by a signal, `number`."""

    def __init__(self, number: int):
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise Terminated where nobody handles them; ignored ones (nohup) stay ignored. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise Terminated(number)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    mine = [number for number, handler in before.items() if handler == signal.SIG_DFL]
    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, before[number])


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP do nothing: for the moment in which something is kept on the way out. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *_SIGNALS)}
    mine = [number for number, handler in before.items() if handler is not None]  # None: set outside Python
    for number in mine:
        signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, before[number])
