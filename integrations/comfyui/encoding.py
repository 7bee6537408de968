"""Prompts that name concepts, through ComfyUI's own tokenizer and text encoders.

A concept's word is its superclass with the last token exchanged for the learned embedding, as in training. ComfyUI's tokens may be
tensors in the place of ids. To know which token it is behind weights, chunks of 77 and `embedding:` words, the prompt is
tokenised with CLIP's start token behind every concept, which no prompt has, and that is taken out again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perfusion.prompts import Mention, parse_prompt

from .concepts import KEY, Loaded, Use

MARK = "<|startoftext|>"
ENCODERS = ("l", "h", "g")  # ComfyUI's names, in the order in which their outputs lie side by side


def encode(clip: Any, concepts: Sequence[Loaded], text: str) -> list:
    """A conditioning of the text, with the concepts that it names in its dictionary under "perfusion"."""
    loaded = {each.name: each for each in concepts}
    prompt = parse_prompt(text, {name: f"{each.concept.superclass} {MARK}" for name, each in loaded.items()})
    if MARK in text:
        raise ValueError(f"a prompt cannot hold {MARK}.")
    tokens, padding = clip.tokenize(prompt.text), clip.tokenize("")
    keys = [key for key in ENCODERS if key in tokens]
    if set(keys) != set(tokens):
        raise ValueError(f"concepts are for models whose text encoders are CLIP's alone; this model has {', '.join(tokens)}.")
    for each in loaded.values():
        if len(each.concept.word_embeddings) != len(keys):
            raise ValueError(f"<{each.name}> is made for {each.concept.base}; this model has {len(keys)} text encoder(s).")
    places: list[list[int]] = []
    for number, key in enumerate(keys):
        words = [(loaded[mention.name].concept.word_embeddings[number], _strength(loaded, mention)) for mention in prompt.mentions]
        found = _insert(tokens[key], words, padding[key][0][-1], _embeddings(clip, key))
        places.append(found)
    if any(other != places[0] for other in places):
        raise ValueError("an `embedding:` before the concept has more vectors for one text encoder than for the other: write it behind.")
    conditioning = _encode(clip, tokens)
    return [[cond, {**options, KEY: _uses(cond, prompt.mentions, places[0], loaded)}] for cond, options in conditioning]


def _encode(clip: Any, tokens: dict) -> list:
    if hasattr(clip, "encode_from_tokens_scheduled"):
        return clip.encode_from_tokens_scheduled(tokens)
    cond, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    return [[cond, {"pooled_output": pooled}]]


def _strength(loaded: dict[str, Loaded], mention: Mention) -> float:
    return loaded[mention.name].strength if mention.strength is None else mention.strength


def _embeddings(clip: Any, key: str) -> Tensor | None:
    """The text encoder's table of token embeddings, where it is where ComfyUI has it."""
    encoder = getattr(getattr(clip, "cond_stage_model", None), f"clip_{key}", None)
    return encoder.transformer.get_input_embeddings().weight if encoder is not None else None


def _insert(chunks: list[list[tuple]], words: Sequence[tuple[Tensor, float]], padding: tuple, table: Tensor | None) -> list[int]:
    """Exchange the token before each mark for its word, in place, and take the marks out. Returns where the words stand."""
    start = chunks[0][0][0]
    marks = [(number, place) for number, chunk in enumerate(chunks) for place, token in enumerate(chunk) if place and _is(token[0], start)]
    if len(marks) != len(words):
        raise ValueError(f"the tokenizer read {len(marks)} of {len(words)} concepts; the prompt may be cut.")
    places = [0] * len(marks)
    for index, (number, place) in reversed(list(enumerate(marks))):
        before = (number, place - 1) if place > 1 else (number - 1, len(chunks[number - 1]) - 2)  # its word ended the chunk before
        old, *rest = chunks[before[0]][before[1]]
        word, strength = words[index]
        if strength != 1 and table is not None and isinstance(old, int):  # as in pipelines: on the way from the superclass to the word
            word = torch.lerp(table[old].to(word), word, strength)
        chunks[before[0]][before[1]] = (word, *rest)
        chunks[number].pop(place)
        chunks[number].append(padding)
        places[index] = before[0] * len(chunks[0]) + before[1]
    shifted = {}  # marks that were taken out before a word, in its chunk
    for index, (number, place) in enumerate(marks):
        chunk = places[index] // len(chunks[0])
        places[index] -= shifted.get(chunk, 0)
        shifted[number] = shifted.get(number, 0) + 1
    return places


def _is(token: Any, start: int) -> bool:
    return isinstance(token, int) and token == start


def _uses(cond: Tensor, mentions: Sequence[Mention], places: Sequence[int], loaded: dict[str, Loaded]) -> tuple[Use, ...]:
    found: dict[str, tuple[Loaded, list[int]]] = {}
    for mention, place in zip(mentions, places):
        one = loaded[mention.name]
        own = {key: getattr(mention, key) for key in ("strength", "bias", "temperature") if getattr(mention, key) is not None}
        found.setdefault(mention.name, (dataclasses.replace(one, **own), []))[1].append(place)
    return tuple(Use(one, cond[0, places].detach().float().cpu()) for one, places in found.values())
