"""The text encoder, from captions alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..model import ENCODING_DIM, EXTRA_WORDS, MAX_TOKENS, build_text_encoder, build_tokenizer, token_ids, vocabulary
from ..text import EMBEDDING_SCALE, codes, noisy_nouns, targets_of
from ..words import OBJECTS
from ..world import caption, sample_pictures
from .stage import Stage

__all__ = ["encode_embeddings", "train_text_encoder"]


def train_text_encoder(work: Path, device: str, steps: int, batch: int = 64) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Learned from captions alone; see `text`. Token embeddings are the codes themselves and stay."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(work / "tokenizer")
    encoder = build_text_encoder(tokenizer)
    table = codes(len(tokenizer), ENCODING_DIM)
    embedding = encoder.get_input_embeddings().weight
    embedding.data.copy_(EMBEDDING_SCALE * table[: len(tokenizer)])
    embedding.requires_grad_(False)
    stage = Stage("text", work, encoder, steps, 3e-3, device, decay=0.995, anneal=0.7)
    ids = {word: tokenizer(word, add_special_tokens=False).input_ids[0] for word in vocabulary()}
    nouns = torch.tensor([ids[word] for word in OBJECTS])
    spare = [word for word in EXTRA_WORDS if word not in ("in", "on")]

    def loss_of(generator: torch.Generator) -> Tensor:
        pictures = sample_pictures(batch, generator, pairs=0.6)
        texts = [_reworded(text.split(), spare, generator) for text in caption(pictures, generator, named=0.6)]
        tokens = token_ids(tokenizer, [" ".join(words) for words in texts])
        targets = targets_of(texts, ids, len(tokenizer), MAX_TOKENS, table)
        embeddings, targets = noisy_nouns(embedding.cpu()[tokens], targets, torch.isin(tokens, nouns), generator)
        encoded = encode_embeddings(encoder, embeddings.to(device))
        errors = (encoded - targets.to(device)) ** 2
        return errors.mean() + errors[torch.isin(tokens, nouns)].mean()

    if not stage.finished:
        stage.run(loss_of)
    return tokenizer, stage.result().requires_grad_(False)


def encode_embeddings(encoder: CLIPTextModel, embeddings: Tensor) -> Tensor:
    """The encoder's output [B, T, D] of token embeddings [B, T, D] instead of ids."""
    hook = encoder.get_input_embeddings().register_forward_hook(lambda module, inputs, output: embeddings)
    try:
        return encoder(torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device))[0]
    finally:
        hook.remove()


def _reworded(words: list[str], spare: list[str], generator: torch.Generator) -> list[str]:
    """Some captions with another article, and some with further words in front, so that places vary."""
    other, front, which = torch.rand(3, generator=generator).tolist()
    if other < 0.2:
        words = [spare[int(which * len(spare))] if word in ("a", "an") else word for word in words]
    if front < 0.2:
        words = [spare[int(torch.randint(len(spare), (1,), generator=generator))] for _ in range(1 + int(front * 20))] + words
    return words
