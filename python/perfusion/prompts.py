"""Concepts in prompts: `a <teddy> in a <teapot>`, `<teddy:0.8>`, `<teddy|bias=0.6,temperature=0.1>`, `<perfusion:teddy:0.8>`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from perfusion.errors import advise
from perfusion.settings import SETTINGS

__all__ = ["Mention", "Prompt", "PromptError", "check_settings", "near_tags", "parse_prompt", "quoted"]

_TAG = re.compile(r"<(?:perfusion:)?([A-Za-z0-9][\w-]{0,31})(?::([^<>|]*))?(?:\|([^<>]*))?>")

_NEAR = re.compile(r"<(\s*)(?:perfusion:)?([A-Za-z0-9][\w-]*)[^<>]*>?")


class PromptError(ValueError):
    """A prompt that names a concept in a way that cannot be understood."""


def quoted(text: str) -> str:
    """A prompt for a message: in quotes, and the middle of a long one left out."""
    return repr(text if len(text) <= 160 else f"{text[:80]} … {text[-72:]}")


@dataclasses.dataclass(frozen=True)
class Mention:
    """One concept in a prompt. `prefix` is the plain text before it; settings that are left open are None, others numbers or schedules."""

    name: str
    prefix: str = ""
    strength: Any = None
    bias: Any = None
    temperature: Any = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """`text` is what the text encoder reads: every `<name>` replaced by its superclass word. request: the `Request` it came as, if any."""

    text: str
    mentions: tuple[Mention, ...] = ()
    request: Any = None


def parse_prompt(text: str, superclasses: Mapping[str, str], tokens: Collection[str] = ()) -> Prompt:
    """Find the concepts in a prompt; their names may be written in capitals.

    superclasses: name -> superclass word of every concept that is loaded; tokens: words such as `<sks>` that the tokenizer
    itself knows (textual inversion): they are left alone, in whatever case. PromptError names an unknown concept and lists
    the known ones, or says which setting breaks which rule.
    """
    tokens = {token.lower() for token in tokens}
    plain, mentions, end = "", [], 0
    for tag in _TAG.finditer(text):
        name = tag.group(1).lower()
        if tag.group(0).lower() in tokens:
            if name in superclasses:
                raise PromptError(
                    f"prompt {quoted(text)}: {tag.group(0)} is both a loaded concept and a word of the tokenizer (a textual inversion). "
                    f"Write <perfusion:{name}> for the concept, or load one of them under another name."
                )
            continue
        if name not in superclasses:
            known = ", ".join(f"<{each}>" for each in sorted(superclasses)) or "none"
            raise advise(
                PromptError(f"prompt {quoted(text)}: no concept {tag.group(0)} is loaded; loaded are: {known}."),
                python="Load it with handle.load(path).",
                command="Give its file with --concept FILE.",
            )
        plain += text[end : tag.start()]
        # the superclass must be a word of its own, or the tokenizer would merge it with its neighbour
        plain += " " if plain[-1:].isalnum() else ""
        mentions.append(Mention(name, plain, **_settings(tag, text)))
        plain += superclasses[name]
        end = tag.end()
        plain += " " if text[end : end + 1].isalnum() else ""
    return Prompt(plain + text[end:], tuple(mentions))


def near_tags(text: str, names: Collection[str]) -> list[str]:
    """What looks like a concept in a prompt and is read as plain text, such as `<teddy` and `<teddy bear>`.

    names: of the loaded concepts, which are also seen behind a space. "i <3 you" and "1 < 2" hold nothing of the kind.
    """
    found = []
    for tag in _NEAR.finditer(_TAG.sub(" ", text)):
        space, name = tag.group(1), tag.group(2)
        if name.lower() in names or (not space and name[0].isalpha()):
            found.append(tag.group(0) if tag.group(0).endswith(">") else tag.group(0)[: tag.end(2) - tag.start()])
    return found


def _settings(tag: re.Match[str], text: str) -> dict[str, float]:
    where = f"prompt {quoted(text)}: {tag.group(0)}"
    pairs = [] if tag.group(2) is None else [("strength", tag.group(2))]
    for pair in (tag.group(3) or "").split(","):
        key, _, value = pair.partition("=")
        pairs += [(key.strip(), value.strip())] if pair.strip() else []
    settings: dict[str, float] = {}
    for key, value in pairs:
        if key not in SETTINGS or key in settings:
            raise PromptError(f"{where} sets {key!r}; it may set each of {', '.join(SETTINGS)} once.")
        try:
            settings[key] = float(value)
        except ValueError:
            raise PromptError(f"{where} sets {key} to {value!r}, which is not a number.") from None
    check_settings(where, **settings)
    return settings


def check_settings(where: str, *, strength: float | None = None, bias: float | None = None, temperature: float | None = None) -> None:
    """PromptError, beginning with `where`, unless every given setting is a number in its range (`SETTINGS`)."""
    for key, value in {"strength": strength, "bias": bias, "temperature": temperature}.items():
        setting = SETTINGS[key]
        if value is not None and not setting.holds(value):
            raise PromptError(f"{where}: {key} must be a number between {setting.low:g} and {setting.high:g}, got {value!r}.")
