"""Concepts as training leaves them, for the tests of a concept and of its file.

    concept = make(base, recipe={"steps": 400})
    assert same(Concept.from_bytes(encode(concept, torch.float32)), concept)
"""

import torch

from perfusion.concept import Concept


def make(base, *, keys=False, seed=0, **fields):
    """A concept of plausible sizes: values about 1, encodings with a few large entries, word embeddings about 0.01."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size, scale=1.0):
        return torch.randn(size, generator=generator) * scale

    target = draw(base.encoding_dim)
    target[0] = 28.0
    tensors = dict(
        value_outputs=draw(base.outputs),
        target=target,
        metric_target=target + draw(base.encoding_dim, 0.1),
        superclass_encoding=draw(base.encoding_dim),
        word_embeddings=tuple(draw(width, 0.01) for width in base.text_widths),
        key_outputs=draw(base.outputs) if keys else None,
    )
    return Concept(**{**dict(name="my-teddy", superclass="teddy", base=base), **tensors, **fields})


TENSORS = ("value_outputs", "target", "metric_target", "superclass_encoding", "key_outputs")
FIELDS = ("name", "superclass", "base", "bias", "temperature", "covariance", "recipe", "created", "license", "author")


def same(a, b):
    """Equal in every field and every bit."""
    pairs = [(getattr(a, field), getattr(b, field)) for field in TENSORS]
    pairs += zip(a.word_embeddings, b.word_embeddings)
    tensors = all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in pairs)
    return tensors and len(a.word_embeddings) == len(b.word_embeddings) and all(getattr(a, f) == getattr(b, f) for f in FIELDS)
