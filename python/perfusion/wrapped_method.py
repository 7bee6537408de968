"""`WrappedMethod`: a method of one object, replaced for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["WrappedMethod"]


class WrappedMethod:
    """A method of one object, wrapped and given back as it was: what the object itself had of that name, normally nothing."""

    def __init__(self, owner: Any, name: str):
        self.owner, self.name = owner, name
        self.own = self.wrapper = None

    def wrap(self, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.own = vars(self.owner).get(self.name)
        self.wrapper = make(getattr(self.owner, self.name))
        setattr(self.owner, self.name, self.wrapper)

    def unwrap(self) -> None:
        if self.wrapper is not None and vars(self.owner).get(self.name) is self.wrapper:
            delattr(self.owner, self.name)
            if self.own is not None:
                setattr(self.owner, self.name, self.own)
