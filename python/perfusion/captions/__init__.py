"""Captions to encode: a built-in corpus of everyday English, and a reader for corpora of your own.

    from perfusion.captions import everyday_captions, read_captions
    for caption in everyday_captions(3):
        print(caption)

The second moment C = E[e eᵀ] (perfusion.covariance; arXiv 2305.01644, section 3) needs captions that move the text encoder
in every direction it uses: many different words, each in many contexts, at many positions. The built-in corpus therefore
comes from a grammar with a wide vocabulary and templates from one-word tags to long sentences with several clauses.
The grammar is two tables: `WORDS` holds the leaves, `RULES` the templates.

    words.py, rules.py  the two tables
    files.py            the reader
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from perfusion.captions.files import read_captions
from perfusion.captions.rules import RULES
from perfusion.captions.words import IRREGULAR_PLURALS, WORDS

__all__ = ["EVERYDAY_COUNT", "everyday_captions", "everyday_source", "read_captions"]

EVERYDAY_COUNT = 20_000

_SYMBOL = re.compile(r"\{(\w+)(:many)?\}")
# "a" and "an" both become "an" before a vowel sound: "uni…", "eu…", "one" and the like start with a consonant's sound.
_ARTICLE = re.compile(r"\ban? (?=(\w))(?=(uni|eu|one|use|ukulele)?)")


def plural(noun: str) -> str:
    """The plural of a noun or of a noun phrase's last word: "toy train" -> "toy trains", "cherry" -> "cherries"."""
    head, space, word = noun.rpartition(" ")
    if word in IRREGULAR_PLURALS:
        word = IRREGULAR_PLURALS[word]
    elif word.endswith("y") and word[-2:-1] not in "aeiou":
        word = word[:-1] + "ies"
    elif word.endswith(("s", "x", "z", "ch", "sh")):
        word += "es"
    else:
        word += "s"
    return head + space + word


def _article(match: re.Match) -> str:
    return "an " if match[1].lower() in "aeiou" and not match[2] else "a "


def _compile() -> dict[str, tuple[tuple[str, ...], ...]]:
    """Both tables as symbol -> templates, each template split into literal text and symbols by `_SYMBOL`.

    A split template is (text, name, ":many" or "", text, name, …, text).
    """
    choices = {name: [" ".join(word.split()) for word in words.split(",")] for name, words in WORDS.items()}
    choices |= {name: [line.strip() for line in lines.strip().splitlines()] for name, lines in RULES.items()}
    return {
        name: tuple(tuple(part or "" for part in _SYMBOL.split(template)) for template in templates)
        for name, templates in choices.items()
    }


def _expand(grammar: dict, symbol: str, rng: random.Random) -> str:
    # random() is the one generator method whose sequence Python guarantees across versions; choice() is not.
    templates = grammar[symbol]
    parts = templates[int(rng.random() * len(templates))]
    text = [parts[0]]
    for at in range(1, len(parts), 3):
        word = _expand(grammar, parts[at], rng)
        text.append(plural(word) if parts[at + 1] else word)
        text.append(parts[at + 2])
    return "".join(text)


def everyday_captions(count: int = EVERYDAY_COUNT, seed: int = 0) -> Iterator[str]:
    """`count` distinct English captions from the built-in grammar, always the same ones for a seed.

    The first n captions do not depend on `count`. 1 to 44 words, 10 on average, in lower case; the first 20,000 use 2,400
    words and at most 48 of CLIP's 77 tokens. Far more than 10⁹ captions exist, so `count` has no practical limit.
    Raises ValueError for count < 1.
    """
    if count < 1:
        raise ValueError(f"everyday_captions: count must be at least 1, not {count}")
    return _everyday_captions(count, seed)


def _everyday_captions(count: int, seed: int) -> Iterator[str]:
    grammar, rng, seen = _compile(), random.Random(seed), set()
    while len(seen) < count:
        caption = _ARTICLE.sub(_article, _expand(grammar, "caption", rng))
        if caption not in seen:
            seen.add(caption)
            yield caption


def everyday_source(count: int = EVERYDAY_COUNT, seed: int = 0) -> str:
    """The name under which a covariance of these captions is stored, such as "everyday-20000-seed0".

    Stored files are found by it. A change to the grammar changes the captions: give the new ones a new name here.
    """
    return f"everyday-{count}-seed{seed}"
