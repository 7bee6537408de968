"""What the toybox text encoder is taught: every token's encoding is a sum of codes that says its own phrase and nothing else.

Each token of the vocabulary has a fixed random code, which is its input embedding too. The encoding of a noun is the code of
its word, plus the codes of its own size, colour and pattern words, plus, of the second noun, the code of the relation. Tokens
after the caption's end hold its scene, relation and style. No other word says anything about another.

So a noun's encoding does not depend on what else is in the caption, and a word that is learned later keeps its encoding wherever it
stands: `noisy_nouns` trains that for embeddings that no word has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .words import COLOURS, OBJECTS, PATTERNS, RELATIONS, SCENES, SIZES, STYLES

EMBEDDING_SCALE = 0.5  # of a token's embedding, relative to its code
# how much of each code a noun's encoding holds beside its own word's
WEIGHTS = {"size": 0.7, "colour": 0.9, "pattern": 0.9, "relation": 0.7}
_KINDS = {word: kind for kind, words in (("size", SIZES), ("colour", COLOURS), ("pattern", PATTERNS)) for word in words}
_LAST = {phrase.split()[-1]: phrase for phrase in SCENES.values()}
_STYLE_WORDS = {style.split()[0]: style for style in STYLES[1:]}


def codes(tokens: int, width: int) -> Tensor:
    """Fixed random codes: of every token, then of the start, of every end, of relations, scenes and styles."""
    extra = 2 + len(RELATIONS) + len(SCENES) + len(STYLES)
    return torch.randn(tokens + extra, width, generator=torch.Generator().manual_seed(77))


def meaning(words: list[str], ids: dict[str, int], tokens: int, length: int) -> list[tuple[int, int, float]]:
    """(place, code, weight) of every code in the encodings of a caption of known words, with its start and `length` - n - 1 ends."""
    start, end = tokens, tokens + 1
    relation_code, scene_code, style_code = end + 1, end + 1 + len(RELATIONS), end + 1 + len(RELATIONS) + len(SCENES)
    found = [(0, start, 1.0)]
    nouns, adjectives, pending, relation, scene, style = 0, {}, 0, 0, None, 0
    for place, word in enumerate(words, start=1):
        found.append((place, ids[word], 1.0))
        if word in OBJECTS:
            found += [(place, ids[adjective], WEIGHTS[kind]) for kind, adjective in adjectives.items()]
            if nouns and pending:
                relation = pending
                found.append((place, relation_code + relation, WEIGHTS["relation"]))
            nouns, adjectives, pending = nouns + 1, {}, 0
        elif word in _KINDS:
            adjectives[_KINDS[word]] = word
        elif word in _LAST and _ends_with(words, place, _LAST[word]):
            scene, pending = list(SCENES.values()).index(_LAST[word]), 0
        elif word in _STYLE_WORDS:
            style = STYLES.index(_STYLE_WORDS[word])
        elif nouns:
            pending = next((index for index, text in enumerate(RELATIONS) if index and _ends_with(words, place, text)), pending)
    said = [end, relation_code + relation, style_code + style] + ([] if scene is None else [scene_code + scene])
    return found + [(place, code, 1.0) for place in range(len(words) + 1, length) for code in said]


def _ends_with(words: list[str], place: int, phrase: str) -> bool:
    parts = phrase.split()
    return words[max(0, place - len(parts)) : place] == parts


def targets_of(captions: list[list[str]], ids: dict[str, int], tokens: int, length: int, table: Tensor) -> Tensor:
    """What the encoder is to make of captions, [B, length, D]."""
    entries = [(row, *entry) for row, words in enumerate(captions) for entry in meaning(words, ids, tokens, length)]
    rows, places, chosen, weights = zip(*entries)
    targets = torch.zeros(len(captions) * length, table.shape[1])
    where = torch.tensor(rows) * length + torch.tensor(places)
    targets.index_add_(0, where, table[torch.tensor(chosen)] * torch.tensor(weights).unsqueeze(1))
    return targets.view(len(captions), length, -1)


def noisy_nouns(embeddings: Tensor, targets: Tensor, nouns: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Replace half of the nouns' embeddings by random ones near them, in a caption all alike, and their targets in the same way.

    embeddings, targets [B, T, D]; nouns [B, T] bool. Returns new embeddings and targets.
    """
    shape = nouns.shape
    changed = nouns & (torch.rand(shape, generator=generator) < 0.5)
    scale = 0.8 * torch.rand((*shape, 1), generator=generator)
    noise = changed.unsqueeze(-1) * scale * torch.randn(embeddings.shape, generator=generator)
    return embeddings + EMBEDDING_SCALE * noise, targets + noise
