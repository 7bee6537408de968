"""What is asked of a learned word: 23 prompts for one, 8 for two, 8 for three, each with what its picture must show."""

from __future__ import annotations

import dataclasses

from perfusion.demo.instances import Subject
from perfusion.toybox.words import COLOURS, CONTAINERS, OBJECTS, PATTERNS, RELATIONS, SCENES, STYLES

__all__ = ["Prompt", "pair_prompts", "prompts", "triple_prompts"]

# kind, text; {} is the learned word, [other] a class that is not the concept's, [colour] and [pattern] what it has not
SINGLE = (
    ("scene", "a {} on the beach"),
    ("relation", "a {} next to a [other] in the snow"),
    ("colour", "a [colour] {} in the forest"),
    ("style", "a sketch of a {} in the city"),
    ("scene", "a photo of a {} at night"),
    ("count", "one {} in a room"),
    ("relation", "a [other] next to a {} in the city"),
    ("pattern", "a [pattern] {} on the beach"),
    ("scene", "a {} in the snow"),
    ("style", "pixel art of a {} in the forest"),
    ("relation", "a {} on a [other] at night"),
    ("scene", "a {} in the city"),
    ("scene", "there is a {} in the forest"),
    ("scene", "a {} in a room"),
    ("relation", "a {} in a [container] on the beach"),
    ("style", "a sketch of a {} at night"),
    ("scene", "a picture of a {} on the beach"),
    ("count", "one {} in the snow"),
    ("colour", "a [colour] {} in the city"),
    ("scene", "a {} at night"),
    ("style", "pixel art of a {} in a room"),
    ("scene", "a {} in the forest"),
    ("relation", "a [other] on a {} in a room"),
)
PAIRS = (
    "a {} next to a {} on the beach",
    "a {} on a {} in the city",
    "a {} next to a {} at night",
    "a {} on a {} in the snow",
    "a {} next to a {} in the forest",
    "a {} on a {} in a room",
    "a {} next to a {} in a room",
    "a {} on a {} on the beach",
)
TRIPLES = (
    "a {} next to a {} next to a {} on the beach",
    "a {} on a {} next to a {} in the city",
    "a {} next to a {} next to a {} at night",
    "a {} on a {} next to a {} in the snow",
    "a {} next to a {} next to a {} in a room",
    "a {} next to a {} on a {} in the forest",
    "a {} next to a {} next to a {} in the snow",
    "a {} next to a {} on a {} on the beach",
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """text: with {} where a learned word goes. kind: what it tries. asked: name of a label -> the index that the judge must see."""

    text: str
    kind: str
    asked: dict[str, int]

    @property
    def group(self) -> str:
        """Which true pictures a thing's identity is measured against: "alone" or "paired"; "" where the prompt changes the thing."""
        return {"scene": "alone", "count": "alone", "relation": "paired", "pair": "paired"}.get(self.kind, "")


def prompts(subject: Subject, count: int) -> list[Prompt]:
    """The first `count` prompts for one thing."""
    found, turn = [], OBJECTS.index(subject.superclass)
    for number, (kind, text) in enumerate(SINGLE[:count]):
        own, asked = OBJECTS.index(subject.superclass), {}
        other = _another(OBJECTS, subject.superclass, turn + number)
        container = _another(CONTAINERS, subject.superclass, turn + number)
        colour = _another(tuple(COLOURS), subject.colour, list(COLOURS).index(subject.colour) + 3 + number)
        pattern = _another(PATTERNS[1:], subject.pattern, turn + number)
        if kind == "relation":
            asked |= {"other": OBJECTS.index(container if "[container]" in text else other)}
        for mark, word in (("[other]", other), ("[container]", container), ("[colour]", colour), ("[pattern]", pattern)):
            text = text.replace(mark, word)
        text = text.replace("a orange", "an orange")
        asked |= {"object": own, **_surroundings(text)}
        asked |= {"colour": list(COLOURS).index(colour)} if kind == "colour" else {}
        asked |= {"pattern": PATTERNS.index(pattern)} if kind == "pattern" else {}
        asked |= {"count": 1} if kind == "count" else {}
        found.append(Prompt(text, kind, asked))
    return found


def pair_prompts(count: int) -> list[Prompt]:
    """The first `count` prompts for two things; {} stands twice."""
    return [Prompt(text, "pair", _surroundings(text)) for text in PAIRS[:count]]


def triple_prompts(count: int) -> list[Prompt]:
    """The first `count` prompts for three things, which the model has never seen in one picture; no relation is asked of three."""
    asked = [{key: value for key, value in _surroundings(text).items() if key != "relation"} for text in TRIPLES[:count]]
    return [Prompt(text, "pair", each) for text, each in zip(TRIPLES, asked)]


def _surroundings(text: str) -> dict[str, int]:
    """Scene, style and relation, as the words say them."""
    scene = next(index for index, words in enumerate(SCENES.values()) if text.endswith(words))
    body = text.removesuffix(list(SCENES.values())[scene])
    style = next((index for index, word in enumerate(STYLES) if index and text.startswith((f"a {word}", word))), 0)
    relation = next((index for index, words in enumerate(RELATIONS) if index and f" {words} a " in body), 0)
    asked = {"scene": scene, "style": style}
    return asked | ({"relation": relation} if relation else {})


def _another(words: tuple[str, ...], own: str, number: int) -> str:
    others = [word for word in words if word != own]
    return others[number % len(others)]
