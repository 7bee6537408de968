"""The server: pictures for many users in one batch, by HTTP. `perfusion serve` runs it; docs/server.md describes it.

    from perfusion.serve import Settings, running

    with running(Settings()) as url:                     # in a thread of this program, on a free port
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
"""

from perfusion.serve.run import running, serve
from perfusion.serve.settings import Settings

__all__ = ["Settings", "running", "serve"]
