"""The server: pictures for many users in one batch, by HTTP. `perfusion serve` runs it; docs/server.md describes it.

    from perfusion.serve import Settings, running

    with running(Settings(port=0)) as url:               # in a thread of this program, on a free port
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")

Names are imported when they are first used: workers, which are processes of their own, load no HTTP.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perfusion.serve.app import create_app
    from perfusion.serve.run import running, serve
    from perfusion.serve.settings import Settings

__all__ = ["Settings", "create_app", "running", "serve"]

_MODULES = {"Settings": "settings", "create_app": "app", "running": "run", "serve": "run"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'perfusion.serve' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"perfusion.serve.{_MODULES[name]}"), name)
