"""Concepts in prompts: `a <teddy> in a <teapot>`, `<teddy:0.8>`, `<teddy|bias=0.6,temperature=0.1>`, `<perfusion:teddy:0.8>`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

__all__ = ["Mention", "Prompt", "PromptError", "parse_prompt"]

_TAG = re.compile(r"<(?:perfusion:)?([A-Za-z0-9][\w-]{0,31})(?::([^<>|]*))?(?:\|([^<>]*))?>")
_SETTINGS = ("strength", "bias", "temperature")


class PromptError(ValueError):
    """A prompt that names a concept in a way that cannot be understood."""


@dataclasses.dataclass(frozen=True)
class Mention:
    """One concept in a prompt. `prefix` is the plain text before it; settings that the prompt left open are None."""

    name: str
    prefix: str
    strength: float | None = None
    bias: float | None = None
    temperature: float | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """`text` is what the text encoder reads: every `<name>` replaced by its superclass word."""

    text: str
    mentions: tuple[Mention, ...] = ()


def parse_prompt(text: str, superclasses: Mapping[str, str], tokens: Collection[str] = ()) -> Prompt:
    """Find the concepts in a prompt.

    superclasses: name -> superclass word of every concept that is loaded; tokens: words such as `<sks>` that the tokenizer
    itself knows (textual inversion): they are left alone. PromptError names an unknown concept and lists the known ones.
    """
    plain, mentions, end = "", [], 0
    for tag in _TAG.finditer(text):
        if tag.group(0) in tokens:
            continue
        name = tag.group(1).lower()
        if name not in superclasses:
            known = ", ".join(f"<{each}>" for each in sorted(superclasses)) or "none"
            raise PromptError(f"prompt {text!r}: no concept {tag.group(0)} is loaded; loaded are: {known}. Load it with handle.load(path).")
        plain += text[end : tag.start()]
        # the superclass must be a word of its own, or the tokenizer would merge it with its neighbour
        plain += " " if plain and plain[-1].isalnum() else ""
        mentions.append(Mention(name, plain, **_settings(tag, text)))
        plain += superclasses[name]
        end = tag.end()
        plain += " " if text[end : end + 1].isalnum() else ""
    return Prompt(plain + text[end:], tuple(mentions))


def _settings(tag: re.Match[str], text: str) -> dict[str, float]:
    pairs = [("strength", tag.group(2))] if tag.group(2) is not None else []
    pairs += [tuple(map(str.strip, pair.partition("=")[::2])) for pair in (tag.group(3) or "").split(",") if pair.strip()]
    settings: dict[str, float] = {}
    for key, value in pairs:
        if key not in _SETTINGS or key in settings:
            raise PromptError(f"prompt {text!r}: {tag.group(0)} sets {key!r}; it may set each of {', '.join(_SETTINGS)} once.")
        try:
            settings[key] = float(value)
        except ValueError:
            raise PromptError(f"prompt {text!r}: {tag.group(0)} sets {key} to {value!r}, which is not a number.") from None
    check_settings(f"prompt {text!r}: {tag.group(0)}", **settings)
    return settings


def check_settings(where: str, *, strength: float | None = None, bias: float | None = None, temperature: float | None = None) -> None:
    """PromptError unless every given setting lies in its range: strength 0 to 4, bias -2 to 2, temperature 0.001 to 10."""
    ranges = {"strength": (strength, 0, 4), "bias": (bias, -2, 2), "temperature": (temperature, 1e-3, 10)}
    for key, (value, low, high) in ranges.items():
        if value is not None and not low <= value <= high:
            raise PromptError(f"{where}: {key} must lie between {low:g} and {high:g}, got {value!r}.")
