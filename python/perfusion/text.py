"""The text side of the hook: `<name>` in prompts becomes the superclass word, with the concept's embedding in its place.

The tokenizer's vocabulary is never touched: `encode_prompt` of one pipeline object is wrapped, the word's input embedding
is substituted by position while the text encoder runs, and every encoding that holds a concept is remembered, so that it
is known again in whatever batch the pipeline puts it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perfusion.base import UnsupportedPipeline, text_encoders
from perfusion.encoding_registry import KnownRows, RowEdit
from perfusion.prompts import Mention, Prompt, PromptError, parse_prompt

__all__ = ["RowEdit", "TextHook", "Word", "added_tokens", "single_token"]

# suggested as superclasses where the tokenizer has them: no small vocabulary has them all
_NOUNS = ("teddy", "dog", "cat", "teapot", "mug", "cup", "boat", "car", "house", "robot", "fish", "toy", "bag", "shoe", "person")


@dataclasses.dataclass
class Word:
    """What the text side needs of a concept: its superclass word and one input embedding [width] per text encoder."""

    superclass: str
    embeddings: Sequence[Tensor]
    strength: float = 1.0
    global_lock: bool = False


@dataclasses.dataclass
class _Side:
    """The prompt, or the negative prompt, of one call: its place in the result and the prompts that each encoder reads."""

    place: int
    prompts: list[list[Prompt]]

    def mentions(self, row: int, copies: int) -> tuple[Mention, ...]:
        """The concepts of one row of the result. A concept acts once however often it is named."""
        found: dict[str, Mention] = {}
        for prompts in filter(None, self.prompts):
            for mention in prompts[min(row // copies, len(prompts) - 1)].mentions:
                first = found.setdefault(mention.name, mention)
                if dataclasses.replace(first, prefix=mention.prefix) != mention:
                    raise PromptError(f"<{mention.name}> is named twice in one prompt with different settings; give them once or alike.")
        return tuple(found.values())


@dataclasses.dataclass(eq=False)
class _Expected:
    """One call of a text encoder that `encode_prompt` is going to make: ids [R, T], and (row, position, concept) in them."""

    ids: Tensor
    substitutions: list[tuple[int, int, Mention]]

    def reads(self, ids: Tensor) -> bool:
        """Whether it is the call with these ids. Some pipelines repeat a single negative prompt for every row."""
        return len(self.ids) in (1, len(ids)) and torch.equal(self.ids.expand(len(ids), -1), ids)


class TextHook:
    """Resolves concepts in the prompts of one pipeline, from `install` to `remove`.

    words: name -> Word of every loaded concept, read at each call. While `enabled` is False every `<name>` is its plain
    superclass word. Gradients flow to the embeddings; an encoding made with gradients to a word is not remembered, as its
    maker says what it needs (`Editor.use`).
    """

    def __init__(self, pipe: Any, words: Mapping[str, Word]):
        if not callable(getattr(pipe, "encode_prompt", None)):
            raise UnsupportedPipeline(f"{type(pipe).__name__} is not supported: it has no encode_prompt, where concepts are read.")
        self.pipe, self.words, self.enabled = pipe, words, True
        self._known = KnownRows()
        self._expected: list[list[_Expected]] = [[] for _ in text_encoders(pipe)]
        self._handles: list[Any] = []
        self._own = self._wrapper = None  # encode_prompt as the pipeline object had it, normally not at all, and as it has it now

    def install(self) -> None:
        for number, (_, encoder) in enumerate(text_encoders(self.pipe)):
            embedding = getattr(encoder, "_orig_mod", encoder).get_input_embeddings()
            self._handles.append(embedding.register_forward_hook(functools.partial(self._substitute, number)))
        self._own = self.pipe.__dict__.get("encode_prompt")
        original = self.pipe.encode_prompt
        signature = inspect.signature(original)

        @functools.wraps(original)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            # somebody who wrapped this one may call it still after `remove`
            return self._encode(original, signature.bind(*args, **kwargs)) if self._handles else original(*args, **kwargs)

        self.pipe.encode_prompt = self._wrapper = encode_prompt

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._wrapper is not None and self.pipe.__dict__.get("encode_prompt") is self._wrapper:
            del self.pipe.encode_prompt
            if self._own is not None:
                self.pipe.encode_prompt = self._own

    def parse(self, text: str, tokens: Collection[str] | None = None) -> Prompt:
        """The prompt, every mention with its strength, without those of strength 0: they are the superclass word and no concept."""
        tokens = added_tokens(self.pipe) if tokens is None else tokens
        prompt = parse_prompt(text, {name: word.superclass for name, word in self.words.items()}, tokens)
        mentions = [dataclasses.replace(mention, strength=self._strength(mention)) for mention in prompt.mentions]
        return dataclasses.replace(prompt, mentions=tuple(mention for mention in mentions if mention.strength))

    def check(self, text: str, tokens: Collection[str] | None = None) -> tuple[Mention, ...]:
        """The concepts that act in a prompt. PromptError, or what else would stop it when it is drawn; nothing is encoded."""
        prompt = self.parse(text, tokens)
        try:
            mentions = _Side(0, [[prompt]]).mentions(0, 1)
        except PromptError as error:
            raise PromptError(f"prompt {text!r}: {error}") from None
        for number in range(len(self._expected)):
            self._expect(number, [prompt])
        return mentions

    def rows_of(self, encodings: Tensor) -> dict[int, RowEdit]:
        """row -> RowEdit for the rows of encodings [R, T, D] that hold concepts; see `KnownRows.find`."""
        return self._known.find(encodings)

    def forget(self, name: str) -> None:
        """Forget every encoding that holds the concept."""
        self._known.forget(name)

    def _strength(self, mention: Mention) -> float:
        if not self.enabled:
            return 0.0
        return self.words[mention.name].strength if mention.strength is None else mention.strength

    def _encode(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        bound.apply_defaults()
        arguments = bound.arguments
        for role in ("prompt_embeds", "negative_prompt_embeds"):
            self._known.recall(arguments.get(role))

        given = {role: value for role in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2") if (value := arguments.get(role))}
        tokens = added_tokens(self.pipe) if given else ()  # with embeddings alone there need be no text encoder any more
        parsed: dict[str, list[Prompt]] = {}
        for role, value in given.items():
            texts = [value] if isinstance(value, str) else list(value)
            if not all(isinstance(text, str) for text in texts):
                continue  # the pipeline's own refusal says it better
            parsed[role] = [self.parse(text, tokens) for text in texts]
            plain = [prompt.text for prompt in parsed[role]]
            if plain != texts:
                arguments[role] = plain[0] if isinstance(value, str) else plain
        mentioned = any(prompt.mentions for prompts in parsed.values() for prompt in prompts)
        if mentioned and arguments.get("clip_skip") is not None:
            raise PromptError("clip_skip does not work with concepts: they were learned on the text encoder's usual hidden layer.")

        sides = self._sides(arguments, parsed)
        result = self._run(original, bound, sides) if mentioned else original(*bound.args, **bound.kwargs)
        if (mentioned or self._known) and not self._trained():
            self._remember(original, bound, result, sides)
        return result

    def _trained(self) -> bool:
        return torch.is_grad_enabled() and any(embedding.requires_grad for word in self.words.values() for embedding in word.embeddings)

    def _sides(self, arguments: Mapping[str, Any], parsed: Mapping[str, list[Prompt]]) -> list[_Side]:
        """What is going to be encoded, in the order in which pipelines stack the rows: the negative prompt first."""
        sides = []
        for place, role in ((1, "negative_prompt"), (0, "prompt")):
            skipped = place == 1 and not arguments.get("do_classifier_free_guidance", True)
            if not skipped and arguments.get(f"{role}_embeds") is None:
                first = parsed.get(role, [])
                sides.append(_Side(place, [first, parsed.get(f"{role}_2", first)][: len(self._expected)]))
        return sides

    def _run(self, original: Callable[..., Any], bound: inspect.BoundArguments, sides: list[_Side]) -> Any:
        # pipelines encode the prompt first; calls that read the same text in another order could not be told apart
        ordered = sorted(sides, key=lambda side: side.place)
        read = [[side.prompts[number] for side in ordered if side.prompts[number]] for number in range(len(self._expected))]
        expected = [[self._expect(number, prompts) for prompts in calls] for number, calls in enumerate(read)]
        try:
            self._expected = expected
            result = original(*bound.args, **bound.kwargs)
            missed = any(call.substitutions for calls in expected for call in calls)
        finally:
            self._expected = [[] for _ in expected]
        if missed:
            raise PromptError(
                f"{type(self.pipe).__name__}.encode_prompt did not send the prompt through the text encoder as it stands, so the "
                "concepts in it could not be put in place. Was the text encoder compiled before attach, or exchanged after it?"
            )
        return result

    def _expect(self, number: int, prompts: list[Prompt]) -> _Expected:
        tokenizer, _ = text_encoders(self.pipe)[number]
        length = tokenizer.model_max_length

        def ids(text: str | list[str], **options: Any) -> Any:
            convert = getattr(self.pipe, "maybe_convert_prompt", lambda text, _: text)  # textual inversions of several vectors
            return tokenizer(convert(text, tokenizer), max_length=length, truncation=True, **options).input_ids

        table = ids([prompt.text for prompt in prompts], padding="max_length", return_tensors="pt")
        substitutions = []
        for row, prompt in enumerate(prompts):
            for mention in prompt.mentions:
                position = 1 + (len(ids(mention.prefix, add_special_tokens=False)) if mention.prefix.strip() else 0)
                if position >= length - 1:
                    raise PromptError(f"prompt {prompt.text!r}: <{mention.name}> lies beyond the {length} tokens that the encoder reads.")
                if table[row, position] != single_token(tokenizer, self.words[mention.name].superclass):
                    raise PromptError(f"prompt {prompt.text!r}: <{mention.name}> must stand as a word of its own.")
                substitutions.append((row, position, mention))
        return _Expected(table, substitutions)

    @torch.compiler.disable
    def _substitute(self, number: int, module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of a token embedding: ids [R, T] -> output [R, T, width]."""
        waiting = self._expected[number]
        if not waiting:
            return None
        ids = args[0].detach().cpu()
        call = next((call for call in waiting if call.reads(ids)), None)
        if call is None:
            return None
        waiting.remove(call)
        if not call.substitutions:
            return None
        output = output.clone()
        for row, position, mention in call.substitutions:
            rows = slice(None) if len(call.ids) == 1 else row
            embedding = self.words[mention.name].embeddings[number].to(output)
            # strength 1 takes the concept's embedding itself, so that no rounding enters
            output[rows, position] = embedding if mention.strength == 1 else torch.lerp(output[rows, position], embedding, mention.strength)
        return output

    def _remember(self, original: Callable[..., Any], bound: inspect.BoundArguments, result: Any, sides: list[_Side]) -> None:
        copies = bound.arguments.get("num_images_per_prompt") or 1
        sides = [side for side in sides if result[side.place] is not None]
        mentions = {side.place: [side.mentions(row, copies) for row in range(len(result[side.place]))] for side in sides}
        plain = None
        if any(self._locks(row) for rows in mentions.values() for row in rows):
            with torch.no_grad():  # the superclass prompt itself: nothing is expected now, so nothing is substituted
                plain = original(*bound.args, **bound.kwargs)

        def edit(place: int, row: int) -> RowEdit | None:
            here = mentions[place][row]
            return RowEdit(here, plain[place][row].cpu() if self._locks(here) else None) if here else None

        self._known.remember([(result[side.place], [edit(side.place, row) for row in range(len(result[side.place]))]) for side in sides])

    def _locks(self, mentions: tuple[Mention, ...]) -> bool:
        return any(self.words[mention.name].global_lock for mention in mentions)


def added_tokens(pipe: Any) -> set[str]:
    """The words that the pipeline's tokenizers have beyond their training: special ones and textual inversions."""
    return set().union(*(tokenizer.get_added_vocab() for tokenizer, _ in text_encoders(pipe)))


def single_token(tokenizer: Any, word: str) -> int:
    """The id of a word that is one token. ValueError says what to do when it is not."""
    ids = _ids(tokenizer, word)
    if not _is_single(tokenizer, ids):
        pieces = tokenizer.convert_ids_to_tokens(ids)
        known = [repr(each) for each in _NOUNS if _is_single(tokenizer, _ids(tokenizer, each))][:3]
        such = f", such as {' or '.join(filter(None, [', '.join(known[:-1]), known[-1]]))}" if known else ""
        raise ValueError(
            f"superclass {word!r} must be a single token of this model's tokenizer, but it becomes {len(ids)} ({', '.join(pieces)}). "
            f"Choose one common word for what the thing is{such}."
        )
    return ids[0]


def _ids(tokenizer: Any, word: str) -> list[int]:
    return tokenizer(word, add_special_tokens=False).input_ids


def _is_single(tokenizer: Any, ids: list[int]) -> bool:
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id
