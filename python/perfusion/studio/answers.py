"""`Answers`: what the server said last of its concepts, base models and jobs, to one visitor."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Answers"]

_LOCK = threading.Lock()  # Gradio copies an `Answers` for each visitor, which a lock of its own would not survive


class Answers:
    """The newest answer to each question: one that was asked earlier never replaces one that was asked later, however slow it was.

    uploaded: the concept that was uploaded last, until a list has turned to it.
    """

    def __init__(self) -> None:
        self.uploaded: str | None = None
        self._newest: dict[str, tuple[float, list[Any]]] = {}

    def ask(self, about: str, question: Callable[[], list[dict[str, Any]]]) -> None:
        """Ask, and keep the answer if none to a later question has come meanwhile. about: "concepts", "bases" or "jobs"."""
        asked = time.monotonic()
        answer = question()
        with _LOCK:
            if about not in self._newest or self._newest[about][0] <= asked:
                self._newest[about] = asked, answer

    def of(self, about: str) -> list[dict[str, Any]] | None:
        """The newest answer; None before the first."""
        return self._newest[about][1] if about in self._newest else None

    def choices(self, about: str) -> list[tuple[str, str]] | None:
        """The same as a list's choices: what it shows, and what it stands for."""
        found = self.of(about)
        if found is None:
            return None
        if about == "jobs":
            return [(f"{job['name']}: {job['status']}, step {job['step']} of {job['steps']}", job["id"]) for job in found]
        field = {"concepts": "name", "bases": "id"}[about]
        return [(each[field], each[field]) for each in found]
