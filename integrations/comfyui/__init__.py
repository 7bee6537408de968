"""Perfusion concepts in ComfyUI. Copy or link this folder into ComfyUI/custom_nodes; README.md says more."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
