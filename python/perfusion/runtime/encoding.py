"""Prompts to encodings: `<name>` becomes the superclass word, and the concept's embedding goes into its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from perfusion.prompts import Mention, Prompt, PromptError, parse_prompt
from perfusion.runtime.concept import Concept
from perfusion.runtime.graphs import Graph
from perfusion.runtime.manifest import Manifest, tokenizer_file
from perfusion.runtime.tokens import PromptTokenizer

__all__ = ["Encoded", "Line", "TextSide"]


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """A prompt with its concepts: name -> concept, and name -> strength of its embedding, of those that act in it."""

    prompt: Prompt
    concepts: Mapping[str, Concept]
    strengths: Mapping[str, float]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for lines that are encoded alike."""
        found = [(each.prefix, id(self.concepts[each.name]), self.strengths[each.name]) for each in self.prompt.mentions]
        return (self.prompt.text, tuple(found))

    def plain(self) -> Line:
        """The superclass prompt."""
        return Line(Prompt(self.prompt.text), {}, {})


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """encodings [T, D] float32, pooled [P] or None, and for each concept the positions of its words."""

    encodings: np.ndarray
    pooled: np.ndarray | None
    places: Mapping[str, tuple[int, ...]]


class TextSide:
    """Tokenizers and text encoders of an export."""

    def __init__(self, folder: Path, manifest: Manifest, graphs: Mapping[str, Graph]):
        self.manifest, self.graphs = manifest, graphs
        files = [folder / tokenizer_file(number) for number in range(len(manifest.tokenizers))]
        self.tokenizers = [PromptTokenizer(file, facts, manifest.token_length) for file, facts in zip(files, manifest.tokenizers)]
        self.words = set().union(*(tokenizer.added for tokenizer in self.tokenizers))

    def check_superclass(self, word: str) -> None:
        """ValueError unless the word is one token of every tokenizer, as for `perfusion.attach`."""
        for tokenizer in self.tokenizers:
            ids = tokenizer.ids(word)
            if len(ids) != 1 or ids[0] == tokenizer.facts.end:  # CLIP's unknown word is its end
                raise ValueError(
                    f"superclass {word!r} must be a single token of this model's tokenizer, but it becomes {len(ids)} "
                    f"({', '.join(tokenizer.tokens(ids))})."
                )

    def parse(self, text: str, concepts: Mapping[str, Concept]) -> Prompt:
        return parse_prompt(text, {name: concept.superclass for name, concept in concepts.items()}, self.words)

    def positions(self, line: Line, tokenizer: PromptTokenizer) -> list[tuple[Mention, int]]:
        """Where each concept stands in the row of ids. PromptError where it is cut off or merged with a neighbour."""
        row, text = tokenizer.row(line.prompt.text), line.prompt.text
        found = []
        for mention in line.prompt.mentions:
            position = 1 + len(tokenizer.ids(mention.prefix))
            if position >= tokenizer.length - 1:
                raise PromptError(f"prompt {text!r}: <{mention.name}> lies beyond the {tokenizer.length} tokens that the encoder reads.")
            if row[position] != tokenizer.ids(line.concepts[mention.name].superclass)[0]:
                raise PromptError(f"prompt {text!r}: <{mention.name}> must stand as a word of its own.")
            found.append((mention, position))
        return found

    def encode(self, lines: Sequence[Line]) -> dict[tuple[object, ...], Encoded]:
        """The encodings of lines by their `key`, each distinct one computed once."""
        lines = list({line.key: line for line in lines}.values())
        places: list[dict[str, tuple[int, ...]]] = [{} for _ in lines]
        parts, pooled = [], None
        for number, (name, tokenizer) in enumerate(zip(self.manifest.text_graphs, self.tokenizers)):
            ids = np.stack([tokenizer.row(line.prompt.text) for line in lines])
            words = np.zeros((*ids.shape, self.manifest.base.text_widths[number]), np.float32)
            weights = np.zeros(ids.shape, np.float32)
            for row, line in enumerate(lines):
                for mention, position in self.positions(line, tokenizer):
                    words[row, position] = line.concepts[mention.name].word_embeddings[number]
                    weights[row, position] = line.strengths[mention.name]
                    if number == 0:
                        places[row][mention.name] = (*places[row].get(mention.name, ()), position)
            encodings, *rest = self.graphs[name](input_ids=ids, word_embeddings=words, word_weights=weights)
            parts.append(np.asarray(encodings, np.float32))
            pooled = np.asarray(rest[0], np.float32) if rest else pooled
        encodings = np.concatenate(parts, -1)
        return {line.key: Encoded(encodings[row], None if pooled is None else pooled[row], places[row]) for row, line in enumerate(lines)}
