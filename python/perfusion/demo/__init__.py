"""`perfusion demo`: two concepts from five pictures each, on the built-in world, with pictures and scores of what came out."""

from perfusion.demo.run import run_demo

__all__ = ["run_demo"]
