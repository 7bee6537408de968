"""The text side of the hook: `<name>` in prompts becomes the superclass word, with the concept's embedding in its place.

The tokenizer's vocabulary is never touched: `encode_prompt` of one pipeline object is wrapped, the word's input embedding
is substituted by position while the text encoder runs, and every encoding that holds a concept is remembered by its
content, so that it is known again in whatever batch the pipeline puts it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perfusion.base import text_encoders
from perfusion.prompts import Mention, Prompt, PromptError, parse_prompt

__all__ = ["RowEdit", "TextHook", "Word"]

REMEMBERED = 4096  # encodings; a digest each, not the encoding


@dataclasses.dataclass
class Word:
    """What the text side needs of a concept: its superclass word and one input embedding [width] per text encoder."""

    superclass: str
    embeddings: Sequence[Tensor]
    strength: float = 1.0
    global_lock: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class RowEdit:
    """The concepts of one row of an encoding, and the row that gives the keys under the global lock [T, D], if any."""

    mentions: tuple[Mention, ...]
    key_encoding: Tensor | None = None


@dataclasses.dataclass
class _Expected:
    """One call of a text encoder that `encode_prompt` is going to make."""

    ids: Tensor
    substitutions: list[tuple[int, int, Mention]]


def digest(row: Tensor) -> bytes:
    """The identity of one encoding [T, D] by content: an address or an object may be reused, its bytes may not."""
    return hashlib.blake2b(row.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes(), digest_size=16).digest()


class TextHook:
    """Resolves concepts in the prompts of one pipeline, from `install` to `remove`.

    words: name -> Word of every loaded concept, read at each call. `rows_of` gives the RowEdits of any batch of encodings.
    """

    def __init__(self, pipe: Any, words: Mapping[str, Word]):
        self.pipe, self.words = pipe, words
        self._expected: list[list[_Expected]] = [[] for _ in text_encoders(pipe)]
        self._known: OrderedDict[bytes, list[RowEdit]] = OrderedDict()
        self._handles: list[Any] = []

    def install(self) -> None:
        for number, (_, encoder) in enumerate(text_encoders(self.pipe)):
            embedding = getattr(encoder, "_orig_mod", encoder).get_input_embeddings()
            self._handles.append(embedding.register_forward_hook(functools.partial(self._substitute, number)))
        self._original = self.pipe.encode_prompt
        signature = inspect.signature(self._original)

        @functools.wraps(self._original)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            return self._encode(self._original, signature.bind(*args, **kwargs))

        self.pipe.encode_prompt = encode_prompt

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.pipe.__dict__.pop("encode_prompt", None)

    def parse(self, text: str) -> Prompt:
        tokens = set().union(*(tokenizer.get_added_vocab() for tokenizer, _ in text_encoders(self.pipe)))
        return parse_prompt(text, {name: word.superclass for name, word in self.words.items()}, tokens)

    # encoding

    def _encode(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        arguments = bound.arguments
        parsed: dict[str, list[Prompt]] = {}
        for role in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
            value = arguments.get(role)
            if value is not None and len(value):
                parsed[role] = [self.parse(text) for text in ([value] if isinstance(value, str) else value)]
        if not any(prompt.mentions for prompts in parsed.values() for prompt in prompts):
            return original(*bound.args, **bound.kwargs)
        if arguments.get("clip_skip") is not None:
            raise PromptError("clip_skip does not work with concepts: they were learned on the text encoder's usual hidden layer.")

        sides = [parsed.get("prompt") if arguments.get("prompt_embeds") is None else None]
        sides += [parsed.get("negative_prompt") if arguments.get("negative_prompt_embeds") is None else None]
        seconds = [parsed.get("prompt_2") or parsed.get("prompt"), parsed.get("negative_prompt_2") or parsed.get("negative_prompt")]
        for number in range(len(self._expected)):
            chosen = [second if number and side is not None else side for side, second in zip(sides, seconds)]
            self._expected[number] = [self._expect(number, prompts) for prompts in chosen if prompts is not None]
        for role, prompts in parsed.items():
            texts = [prompt.text for prompt in prompts]
            arguments[role] = texts[0] if isinstance(arguments[role], str) else texts
        try:
            result = original(*bound.args, **bound.kwargs)
            missed = [call for calls in self._expected for call in calls if call.substitutions]
        finally:
            self._expected = [[] for _ in self._expected]
        if missed:
            raise PromptError(
                f"{type(self.pipe).__name__}.encode_prompt did not send the prompt through the text encoder as it stands, so the "
                "concepts in it were not put in place. Give plain prompts, or none with concepts."
            )
        self._remember(original, bound, result, sides, seconds)
        return result

    def _expect(self, number: int, prompts: list[Prompt]) -> _Expected:
        tokenizer, encoder = text_encoders(self.pipe)[number]
        convert = getattr(self.pipe, "maybe_convert_prompt", lambda text, _: text)
        length = tokenizer.model_max_length
        texts = [convert(prompt.text, tokenizer) for prompt in prompts]
        ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        substitutions = []
        for row, prompt in enumerate(prompts):
            for mention in prompt.mentions:
                word = single_token(tokenizer, self.words[mention.name].superclass)
                before = tokenizer(convert(mention.prefix, tokenizer), add_special_tokens=False).input_ids if mention.prefix.strip() else []
                position = 1 + len(before)
                if position >= length - 1:
                    raise PromptError(f"prompt {prompt.text!r}: <{mention.name}> lies beyond the {length} tokens that the text encoder reads.")
                if ids[row, position] != word:
                    raise PromptError(f"prompt {prompt.text!r}: <{mention.name}> must stand as a word of its own.")
                substitutions.append((row, position, mention))
        return _Expected(ids, substitutions)

    def _substitute(self, number: int, module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of a token embedding: output [B, T, width]."""
        waiting = self._expected[number]
        if not waiting:
            return None
        ids = args[0].detach().cpu()
        call = next((call for call in waiting if call.ids.shape == ids.shape and torch.equal(call.ids, ids)), None)
        if call is None:
            return None
        waiting.remove(call)
        if not call.substitutions:
            return None
        output = output.clone()
        for row, position, mention in call.substitutions:
            word = self.words[mention.name]
            strength = word.strength if mention.strength is None else mention.strength
            embedding = word.embeddings[number].to(output)
            # strength 1 takes the concept's embedding itself, so that no rounding enters
            output[row, position] = embedding if strength == 1 else torch.lerp(output[row, position], embedding, strength)
        return output

    # remembering

    def _remember(self, original, bound: inspect.BoundArguments, result: Any, sides: list, seconds: list) -> None:
        copies = bound.arguments.get("num_images_per_prompt", 1) or 1
        plain = None
        if any(self.words[m.name].global_lock for side in sides for prompt in side or () for m in prompt.mentions):
            plain = original(*bound.args, **bound.kwargs)  # the superclass prompt itself: nothing is expected, nothing substituted
        fresh: dict[bytes, list[RowEdit]] = {}
        for which, (side, second) in enumerate(zip(sides, seconds)):
            if side is None:
                continue
            for row, encoding in enumerate(result[which]):
                prompts = {id(p): p for group in (side, second or side) for p in [group[min(row // copies, len(group) - 1)]]}
                mentions = self._unique([mention for prompt in prompts.values() for mention in prompt.mentions])
                if mentions:
                    locked = plain is not None and any(self.words[mention.name].global_lock for mention in mentions)
                    fresh.setdefault(digest(encoding), []).append(RowEdit(mentions, plain[which][row] if locked else None))
        for key, edits in fresh.items():
            self._known[key] = edits
            self._known.move_to_end(key)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _unique(self, mentions: list[Mention]) -> tuple[Mention, ...]:
        """A concept acts once in a row however often it is named; strength 0 is the superclass word and no concept."""
        found: dict[str, Mention] = {}
        for mention in mentions:
            first = found.setdefault(mention.name, mention)
            if (first.strength, first.bias, first.temperature) != (mention.strength, mention.bias, mention.temperature):
                raise PromptError(f"<{mention.name}> is named twice in one prompt with different settings; give them once or alike.")
        strengths = {name: self.words[name].strength if m.strength is None else m.strength for name, m in found.items()}
        return tuple(mention for name, mention in found.items() if strengths[name] != 0)

    def rows_of(self, encodings: Tensor) -> dict[int, RowEdit]:
        """row -> RowEdit for the rows of encodings [R, T, D] that hold concepts.

        Rows of equal content take their edits in the order in which the prompts were given: the rows of a batch keep it,
        with or without guidance, and repeat it where a pipeline doubles its conditional rows.
        """
        if not self._known:
            return {}
        seen: dict[bytes, int] = {}
        found = {}
        for row, encoding in enumerate(encodings):
            key = digest(encoding)
            edits = self._known.get(key)
            if edits is not None:
                count = seen[key] = seen.get(key, -1) + 1
                found[row] = edits[count % len(edits)]
        return found

    def forget(self, name: str) -> None:
        """Forget every encoding that holds the concept."""
        self._known = OrderedDict((k, v) for k, v in self._known.items() if all(m.name != name for edit in v for m in edit.mentions))


def single_token(tokenizer: Any, word: str) -> int:
    """The id of a word that is one token. ValueError says what to do when it is not."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(
            f"superclass {word!r} must be a single token of this model's tokenizer, but it becomes {len(ids)} ({', '.join(pieces)}). "
            "Choose one common word for what the thing is, such as 'teddy' or 'dog'."
        )
    return ids[0]
