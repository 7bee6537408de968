"""Prompts to token ids, by the `tokenizers` library, framed and filled up as the model's own tokenizer does it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from perfusion.runtime.manifest import MAX_TOKENIZER_BYTES, ExportedFolderError, TokenizerFacts

__all__ = ["PromptTokenizer"]


class PromptTokenizer:
    """One text encoder's tokenizer. length: T; facts: see `TokenizerFacts`."""

    def __init__(self, path: Path, facts: TokenizerFacts, length: int):
        import tokenizers

        self.facts, self.length = facts, length
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ExportedFolderError(f"{path} is larger than {MAX_TOKENIZER_BYTES:,} bytes: it is no tokenizer that this program wrote.")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
        except BaseException as error:  # the library's own are plain Exceptions, and its panics not even that
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise ExportedFolderError(f"{path} is no tokenizer ({error}). Export the model again.") from None
        self.added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}

    def ids(self, text: str) -> list[int]:
        """The ids of a text alone, of any length."""
        if self.facts.expansions:
            words = "|".join(map(re.escape, sorted(self.facts.expansions, key=len, reverse=True)))
            text = re.sub(words, lambda found: self.facts.expansions[found[0]], text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def row(self, text: str) -> np.ndarray:
        """The ids [T] that the text encoder reads: begin, as many as fit, end, filled up."""
        ids = [self.facts.begin, *self.ids(text)[: self.length - 2], self.facts.end]
        return np.array(ids + [self.facts.pad] * (self.length - len(ids)), np.int64)

    def tokens(self, ids: list[int]) -> list[str]:
        return [self._tokenizer.id_to_token(each) or "?" for each in ids]
