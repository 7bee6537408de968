"""Stand-ins for the small tokenizers and text encoders that diffusers' tests load from the model hub, so that they run without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMIT = "0" * 40


def write(cache: Path) -> dict[str, str]:
    """Fill an empty folder as the hub's cache would be; returns the environment in which it is used, and nothing else is asked for."""
    from tests.perfusion.tiny import WORDS, tiny_kolors, tiny_pixart, tiny_tokenizer

    # the tests' CLIP encoders have a thousand tokens, 512 of which are bytes
    _keep(cache, "tiny-random-clip", tiny_tokenizer(words=WORDS[:60]))
    pixart = tiny_pixart(width=32)
    _keep(cache, "tiny-random-t5", pixart.tokenizer, pixart.text_encoder)
    kolors = tiny_kolors(width=32)
    _keep(cache, "tiny-random-chatglm3-6b", kolors.tokenizer, kolors.text_encoder)
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def _keep(cache: Path, name: str, *parts: Any) -> None:
    home = cache / f"models--hf-internal-testing--{name}"
    folder = home / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for part in parts:
        part.save_pretrained(folder)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT, encoding="utf-8")
