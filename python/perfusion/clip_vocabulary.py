"""The tokenizer of CLIP, made of what ships with this package: a checkpoint that is one file holds no vocabulary."""

from __future__ import annotations

import gzip
import json
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

__all__ = ["clip_tokenizer", "write_tokenizer"]

_BYTES = 256


def _alphabet() -> list[str]:
    """The 256 printable characters that stand for the byte values, in the vocabulary's order: printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in (*printable, *range(_BYTES, 2 * _BYTES - len(printable)))]


def _merges() -> str:
    return gzip.decompress((resources.files("perfusion") / "configurations" / "clip_merges.txt.gz").read_bytes()).decode("utf-8")


def write_tokenizer(folder: Path, settings: dict[str, Any]) -> None:
    """vocab.json, merges.txt and tokenizer_config.json as transformers reads them. settings: of tokenizer_config.json."""
    merges, alphabet = _merges(), _alphabet()
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(line.replace(" ", "") for line in merges.splitlines())]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.dumps({token: number for number, token in enumerate(tokens)}, ensure_ascii=False)
    for name, text in (
        ("vocab.json", vocabulary),
        ("merges.txt", f"#version: 0.2\n{merges}"),
        ("tokenizer_config.json", json.dumps(settings)),
    ):
        (folder / name).write_text(text, encoding="utf-8")


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """CLIP's tokenizer: 49,408 tokens, 77 at most in a text, lower-casing. SD 2.x and the second encoder of XL pad with "!"."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True})
        return CLIPTokenizer.from_pretrained(folder, pad_token=pad_token)
