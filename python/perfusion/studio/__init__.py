"""The page in front of `perfusion serve`: pictures, masks, training, strips and regions in a browser, over the HTTP API alone."""

from perfusion.studio.client import Client, ServerError

__all__ = ["Client", "ServerError", "create_page", "launch"]


def __getattr__(name: str) -> object:
    """The page needs Gradio; its client does not."""
    if name in ("create_page", "launch"):
        from perfusion.studio import page

        return getattr(page, name)
    raise AttributeError(f"module 'perfusion.studio' has no attribute {name!r}")
