"""The text side of the hook: `<name>` in prompts becomes the superclass word, with the concept's embedding in its place.

The tokenizer's vocabulary is never touched: `encode_prompt` of one pipeline object is wrapped, the word's input embedding
is substituted by position while the text encoder runs, and every encoding that holds a concept is remembered, so that it
is known again in whatever batch the pipeline puts it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perfusion.base import UnsupportedPipeline, text_encoders
from perfusion.base.parts import plain_module, prepared_text, tokenizers
from perfusion.encoding_registry import EncodingRegistry
from perfusion.loaded_concept import LoadedConcept
from perfusion.prompts import Mention, Prompt, PromptError, parse_prompt, quoted
from perfusion.requests import Request, RowRequest
from perfusion.settings import SETTINGS
from perfusion.text_lock import TextLock
from perfusion.wrapped_method import WrappedMethod

__all__ = ["TextHook", "added_tokens", "superclass_tokens", "warn_of_unknown_word"]

MOST_TOKENS = 16  # of a superclass
READING = ("max_sequence_length", "clean_caption")  # arguments of `encode_prompt`, of pipelines around T5 and GLM
PIECES = 3  # tokens of a word that a model may still know

JOINS = "StableDiffusionInstructPix2PixPipeline"  # the one whose method is _encode_prompt and gives one tensor

# suggested as superclasses where the tokenizer has them: no small vocabulary has them all
_NOUNS = ("teddy", "dog", "cat", "teapot", "mug", "cup", "boat", "car", "house", "robot", "fish", "toy", "bag", "shoe", "person")


@dataclasses.dataclass
class _Side:
    """The prompt, or the negative prompt, of one call: its place in the result and the prompts that each encoder reads."""

    place: int
    prompts: list[list[Prompt]]

    def of_row(self, row: int, copies: int) -> list[Prompt]:
        """What each text encoder reads for one row of the result."""
        return [prompts[min(row // copies, len(prompts) - 1)] for prompts in filter(None, self.prompts)]

    def request(self, row: int, copies: int) -> Request | None:
        return next((prompt.request for prompt in self.of_row(row, copies) if prompt.request is not None), None)

    def mentions(self, row: int, copies: int) -> tuple[Mention, ...]:
        """The concepts of one row of the result. A concept acts once however often it is named."""
        found: dict[str, Mention] = {}
        for prompt in self.of_row(row, copies):
            for mention in prompt.mentions:
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


class _Encoding(threading.local):
    """The call of `encode_prompt` that goes on in this thread. Others may send texts through the same encoders meanwhile.

    expected: for each text encoder, the calls that are to come. reading: the arguments that change the way from a prompt to ids.
    """

    expected: Sequence[list[_Expected]] = ()

    def __init__(self, reading: Mapping[str, Any]):
        self.reading = reading


def _encode_methods(pipe: Any) -> list[tuple[Any, str]]:
    """(object, method) of where a pipeline encodes prompts: itself, or the blocks of a modular one that do."""
    blocks = getattr(pipe, "_blocks", None) or getattr(pipe, "blocks", None)  # diffusers 0.35 has no underscore
    if blocks is None:
        name = "_encode_prompt" if any(kind.__name__ == JOINS for kind in type(pipe).__mro__) else "encode_prompt"
        return [(pipe, name)] if callable(getattr(pipe, name, None)) else []
    found, waiting = [], [blocks]
    while waiting:
        block = waiting.pop()
        waiting += block.sub_blocks.values()
        if callable(getattr(block, "encode_prompt", None)):
            found.append((block, "encode_prompt"))
    return found


class TextHook:
    """Resolves concepts in the prompts of one pipeline, from `install` to `remove`.

    words: name -> LoadedConcept of every loaded concept, read at each call. While `enabled` is False every `<name>` is its plain
    superclass word. Gradients flow to the embeddings; an encoding made with gradients to a word is not remembered, as its
    maker says what it needs (`ProjectionHooks.use`).
    """

    def __init__(self, pipe: Any, words: Mapping[str, LoadedConcept], on_encode: Callable[[], None] = lambda: None):
        self._methods = [WrappedMethod(owner, name) for owner, name in _encode_methods(pipe)]
        if not self._methods:
            raise UnsupportedPipeline(f"{type(pipe).__name__} is not supported: it has no encode_prompt, where concepts are read.")
        self._parameters = inspect.signature(getattr(self._methods[0].owner, self._methods[0].name)).parameters
        self._usual = {key: self._parameters[key].default for key in READING if key in self._parameters}
        self.pipe, self.words, self.enabled, self._on_encode = pipe, words, True, on_encode
        self._known = EncodingRegistry()
        self._encoding, self._pairs = _Encoding(self._usual), text_encoders(pipe, required=False)
        self.lock = TextLock((*tokenizers(pipe), *(plain_module(encoder) for _, encoder in self._pairs)))
        self._written: dict[str, list[list[int]]] = {}  # name -> for each text encoder, the ids of "<name>"
        self._handles: list[Any] = []
        self._frames: dict[Any, tuple[int, int]] = {}  # tokenizer -> special tokens before and behind a text

    def __deepcopy__(self, memo: Any) -> TextHook:
        raise RuntimeError("a pipeline with perfusion attached cannot be copied: detach, copy, and attach to both.")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a pipeline with perfusion attached cannot be pickled: detach first.")

    def install(self) -> None:
        for name, word in self.words.items():
            self.learn(name, word.superclass)
        for number, (_, encoder) in enumerate(self._pairs):
            for embedding in _embeddings(encoder):
                self._handles.append(embedding.register_forward_hook(functools.partial(self._substitute, number)))
        for method in self._methods:
            method.wrap(self._wrapped)

    def _wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            # somebody who wrapped this one may call it still after `remove`, and a block may be copied into another pipeline
            bound = signature.bind(*args, **kwargs) if self._handles else None
            if bound is None or bound.arguments.get("components", self.pipe) is not self.pipe:
                return original(*args, **kwargs)
            with self.lock.held():
                return self._encode(original, bound)

        return encode_prompt

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for method in self._methods:
            method.unwrap()

    def parse(self, text: str, tokens: Collection[str] | None = None) -> Prompt:
        """The prompt, every mention with its strength, without those of strength 0: they are the superclass word and no concept."""
        tokens = added_tokens(self.pipe) if tokens is None else tokens
        superclasses = {name: word.superclass for name, word in self.words.items()}
        request = text if isinstance(text, Request) else None
        if request is not None:
            superclasses |= {own: self._named(text, name).superclass for own, name in request.names.items()}
            request.check_names(superclasses)
        prompt = parse_prompt(str(text), superclasses, tokens)
        mentions = [self._settled(mention, request) for mention in prompt.mentions]
        return Prompt(prompt.text, tuple(mention for mention in mentions if mention.strength != 0), request)

    def read_at(self, number: int, text: str) -> list[int]:
        """Where text encoder `number` reads each concept of a prompt, after textual inversions before it have become their tokens."""
        return [position for _, position, _ in self._expect(number, [self.parse(text)]).substitutions]

    def overlong(self, text: str) -> bool:
        """Whether a text encoder reads a prompt's beginning only."""
        plain = self.parse(text).text
        return any(len(self._ids(number, plain, truncation=False)) > self._length(number) for number in range(len(self._pairs)))

    def check(self, text: str, tokens: Collection[str] | None = None) -> tuple[Mention, ...]:
        """The concepts that act in a prompt. PromptError, or what else would stop it when it is drawn; nothing is encoded."""
        prompt = self.parse(text, tokens)
        try:
            mentions = _Side(0, [[prompt]]).mentions(0, 1)
        except PromptError as error:
            raise PromptError(f"prompt {quoted(text)}: {error}") from None
        for number in range(len(self._pairs)):
            self._expect(number, [prompt])
        return mentions

    def bind(self, encodings: Tensor, prompts: Sequence[str]) -> None:
        """Say that row r of encodings [R, T, D], however they were made, was made with prompts[r]."""
        self._known.remember([(encodings, [self._bound(row, text) for row, text in zip(encodings, prompts)])])

    def _bound(self, row: Tensor, text: str) -> RowRequest | None:
        prompt = self.parse(text)
        mentions = _Side(0, [[prompt]]).mentions(0, 1)
        if not mentions:
            return None
        key_encoding = None
        if self._locks(mentions, prompt.request):
            if not self._pairs:
                raise PromptError(f"prompt {quoted(text)}: the global key lock encodes the superclass prompt; there is no text encoder.")
            with torch.no_grad():
                encoded = self._encoded_plainly(prompt.text, row)
                key_encoding = _parts(encoded, {})[0][0].cpu()
            if key_encoding.shape != row.shape:
                needed = f"the global key lock needs encodings of {len(key_encoding)} tokens"
                raise PromptError(f"prompt {quoted(text)}: {needed}, got {len(row)}.")
        request = self.row_request(mentions, [prompt] * max(1, len(self.tokenizers())), key_encoding)
        length = self._length(0, len(row)) if self.tokenizers() else len(row)
        return dataclasses.replace(request, places=tuple(_in_chunks(places, length, len(row)) for places in request.places))

    def _encoded_plainly(self, text: str, row: Tensor) -> Any:
        """What the pipeline makes of a text without concepts, of as many tokens as a row [T, D]."""
        options = dict(components=self.pipe, prompt=text, device=row.device, num_images_per_prompt=1, max_sequence_length=len(row))
        options |= dict(do_classifier_free_guidance=False, prepare_unconditional_embeds=False)
        method = getattr(self._methods[0].owner, self._methods[0].name)
        return method(**{name: value for name, value in options.items() if name in self._parameters})

    def rows_of(self, encodings: Tensor) -> dict[int, RowRequest]:
        """row -> RowRequest for the rows of encodings [R, T, D] that hold concepts; see `EncodingRegistry.find`."""
        return self._known.find(encodings)

    def knows(self, row: Tensor) -> bool:
        """Whether a row [T, D] was made by `encode_prompt` or bound, with concepts or without."""
        return self._known.known(row)

    def learn(self, name: str, superclass: str) -> None:
        """A concept is going to be loaded: `<name>` is noticed from now on where something else sends it to a text encoder.

        ValueError where a tokenizer cannot read the superclass.
        """
        with self.lock.held():
            for tokenizer in self.tokenizers():
                superclass_tokens(tokenizer, superclass)
            # here, as the hook that compares them runs in threads of others, which may not wait for the lock
            self._written[name] = [tokenizer(f"<{name}>", add_special_tokens=False).input_ids for tokenizer, _ in self._pairs]

    def forget(self, name: str) -> None:
        """Forget a concept, and every encoding that holds it."""
        self._written.pop(name, None)
        self._known.forget(name)

    def _named(self, text: str, name: str) -> LoadedConcept:
        if name not in self.words:
            known = ", ".join(sorted(self.words)) or "none"
            raise PromptError(f"request {text!r}: names ask for a concept {name!r}, which is not loaded; loaded are: {known}.")
        return self.words[name]

    def _settled(self, mention: Mention, request: Request | None) -> Mention:
        """A mention by the name under which its concept is loaded, with what its request sets, and with its strength."""
        name, settings = mention.name, {}
        if request is not None:
            name = request.names.get(mention.name, mention.name)
            settings = {key: request.setting(key, mention.name) for key in SETTINGS if getattr(mention, key) is None}
        mention = dataclasses.replace(mention, name=name, **settings)
        if not self.enabled:
            return dataclasses.replace(mention, strength=0.0)
        return mention if mention.strength is not None else dataclasses.replace(mention, strength=self.words[name].strength)

    def _encode(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        self._on_encode()
        bound.apply_defaults()
        arguments = bound.arguments
        self._encoding.reading = {key: arguments[key] for key in self._usual}
        try:
            return self._read(original, bound, arguments)
        finally:
            self._encoding.reading = self._usual

    def _read(self, original: Callable[..., Any], bound: inspect.BoundArguments, arguments: dict[str, Any]) -> Any:
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
        if self.words and not self._trained():  # plain rows are remembered as plain, while there is anything else to be
            self._remember(original, bound, _parts(result, arguments), sides)
        return result

    def _trained(self) -> bool:
        return torch.is_grad_enabled() and any(embedding.requires_grad for word in self.words.values() for embedding in word.embeddings)

    def _sides(self, arguments: Mapping[str, Any], parsed: Mapping[str, list[Prompt]]) -> list[_Side]:
        """What is going to be encoded, in the order in which pipelines stack the rows: the negative prompt first."""
        sides = []
        for place, role in ((1, "negative_prompt"), (0, "prompt")):
            guided = arguments.get("do_classifier_free_guidance", arguments.get("prepare_unconditional_embeds", True))
            skipped = place == 1 and not guided
            if not skipped and arguments.get(f"{role}_embeds") is None:
                first = parsed.get(role, [])
                sides.append(_Side(place, [first, parsed.get(f"{role}_2", first)][: len(self._pairs)]))
        return sides

    def _run(self, original: Callable[..., Any], bound: inspect.BoundArguments, sides: list[_Side]) -> Any:
        # pipelines encode the prompt first; calls that read the same text in another order could not be told apart
        ordered = sorted(sides, key=lambda side: side.place)
        read = [[side.prompts[number] for side in ordered if side.prompts[number]] for number in range(len(self._pairs))]
        expected = [[self._expect(number, prompts) for prompts in calls] for number, calls in enumerate(read)]
        try:
            self._encoding.expected = expected
            result = original(*bound.args, **bound.kwargs)
            missed = any(call.substitutions for calls in expected for call in calls)
        finally:
            self._encoding.expected = ()
        if missed:
            raise PromptError(
                f"{type(self.pipe).__name__}.encode_prompt did not send the prompt through the text encoder as it stands, so the "
                "concepts in it could not be put in place. Was the text encoder compiled before attach, or exchanged after it? Or does a "
                "pipeline that is not attached use its tokenizer in another thread? Give that one a copy, copy.deepcopy(tokenizer)."
            )
        return result

    def _expect(self, number: int, prompts: list[Prompt]) -> _Expected:
        length, behind = self._length(number), self._frame(number)[1]
        table = self._ids(number, [prompt.text for prompt in prompts], padding="max_length", return_tensors="pt")
        substitutions = []
        for row, prompt in enumerate(prompts):
            for mention in prompt.mentions:
                word, position = self._word(number, mention), self._position(number, mention, prompt.text)
                where = f"prompt {quoted(prompt.text)}: <{mention.name}>"
                if position >= length - behind:
                    raise PromptError(f"{where} lies beyond the {length} tokens that the encoder reads.")
                if table[row, position + 1 - len(word) : position + 1].tolist() != word:
                    raise PromptError(f"{where} must stand as a word of its own.")
                substitutions.append((row, position, mention))
        return _Expected(table, substitutions)

    def _ids(self, number: int, text: str | list[str], **options: Any) -> Any:
        """Ids of a text, or of several, as the pipeline makes them."""
        tokenizer = self.tokenizers()[number]
        convert = getattr(self.pipe, "maybe_convert_prompt", lambda text, _: text)  # textual inversions of several vectors
        given = {"max_length": self._length(number), "truncation": True, **options}
        if given["truncation"] is False:
            del given["max_length"]
        with self.lock.held():
            return tokenizer(convert(self._prepared(text), tokenizer), **given).input_ids

    def _prepared(self, text: str | list[str]) -> str | list[str]:
        return prepared_text(self.pipe, text, bool(self._encoding.reading.get("clean_caption")))

    def _length(self, number: int, given: int | None = None) -> int:
        """How many tokens a text encoder reads: of an encoding of `given` ones, or in the call that goes on."""
        if "max_sequence_length" in self._usual:
            return given or self._encoding.reading["max_sequence_length"]
        return self.tokenizers()[number].model_max_length

    def _frame(self, number: int) -> tuple[int, int]:
        """How many special tokens stand before a text, and how many behind it."""
        tokenizer = self.tokenizers()[number]
        if tokenizer not in self._frames:
            with self.lock.held():
                inner, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
            front = next(at for at in range(len(whole)) if whole[at : at + len(inner)] == inner)
            self._frames[tokenizer] = front, len(whole) - front - len(inner)
        return self._frames[tokenizer]

    def _position(self, number: int, mention: Mention, text: str) -> int:
        """The token of a text encoder's input at which the concept of a text stands, the last of its superclass; maybe beyond the end."""
        before = self._ids(number, mention.prefix + self.words[mention.name].superclass, add_special_tokens=False, truncation=False)
        padding = 0
        if getattr(self.tokenizers()[number], "padding_side", "right") == "left":
            padding = self._length(number) - len(self._ids(number, text))
        return padding + self._frame(number)[0] + len(before) - 1

    def _word(self, number: int, mention: Mention) -> list[int]:
        """The tokens of the mention's superclass."""
        with self.lock.held():
            return superclass_tokens(self.tokenizers()[number], self._prepared(self.words[mention.name].superclass))

    def tokenizers(self) -> list[Any]:
        """Those that the pipeline has, also where the text encoders are gone."""
        return tokenizers(self.pipe)

    def places(self, prompts: Sequence[Prompt], names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """For each name the positions of its words in an encoding of one row, whose text encoders read these prompts."""
        found: dict[str, set[int]] = {name: set() for name in names}
        for number, prompt in enumerate(prompts[: len(self.tokenizers())]):
            for mention in prompt.mentions:
                found[mention.name].add(self._position(number, mention, prompt.text))
        return tuple(tuple(sorted(found[name])) for name in names)

    @torch.compiler.disable
    def _substitute(self, number: int, module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of a token embedding: ids [R, T] -> output [R, T, width]."""
        expected = self._encoding.expected
        if not expected or not expected[number]:
            self._warn_of_names(number, args[0])
            return None
        waiting = expected[number]
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
            # and so does a schedule, whose steps come when the text is long encoded
            whole = mention.strength == 1 or not isinstance(mention.strength, numbers.Real)
            output[rows, position] = embedding if whole else torch.lerp(output[rows, position], embedding, mention.strength)
        return output

    def _warn_of_names(self, number: int, ids: Tensor) -> None:
        """Of `<name>` that reaches the text encoder as it is: from a pipeline of the same parts, or from whoever calls the encoder."""
        for name, encoders in list(self._written.items()):
            written = encoders[number]
            if name not in self.words or not 1 < len(written) <= ids.shape[-1]:  # one token: a textual inversion of that name
                continue
            if (ids.detach().cpu().unfold(-1, len(written), 1) == torch.tensor(written)).all(-1).any():
                warnings.warn(
                    f"a text with <{name}> was encoded by something else than the pipeline that perfusion is attached to, so it is plain "
                    "text: neither concept nor superclass word. Attach to the pipeline that reads it, or tell the handle by handle.bind.",
                    stacklevel=2,
                )

    def _remember(self, original: Callable[..., Any], bound: inspect.BoundArguments, result: Any, sides: list[_Side]) -> None:
        copies = bound.arguments.get("num_images_per_prompt") or 1
        sides = [side for side in sides if result[side.place] is not None]
        mentions = {side.place: [side.mentions(row, copies) for row in range(len(result[side.place]))] for side in sides}
        plain = None
        rows = [(here, side.request(row, copies)) for side in sides for row, here in enumerate(mentions[side.place])]
        if any(self._locks(here, request) for here, request in rows if here):
            with torch.no_grad():  # the superclass prompt itself: nothing is expected now, so nothing is substituted
                plain = _parts(original(*bound.args, **bound.kwargs), bound.arguments)

        requests: dict[tuple[int, int], RowRequest | None] = {}  # rows that are copies share theirs, so they share keys and values

        def request(side: _Side, row: int) -> RowRequest | None:
            at = side.place, row // copies
            if at not in requests:
                here = mentions[side.place][row]
                key_encoding = plain[side.place][row].cpu() if here and self._locks(here, side.request(row, copies)) else None
                requests[at] = self.row_request(here, side.of_row(row, copies), key_encoding) if here else None
            return requests[at]

        self._known.remember([(result[side.place], [request(side, row) for row in range(len(result[side.place]))]) for side in sides])

    def row_request(self, mentions: tuple[Mention, ...], prompts: Sequence[Prompt], key_encoding: Tensor | None) -> RowRequest:
        """What a row wants whose text encoders read these prompts."""
        request = next((prompt.request for prompt in prompts if prompt.request is not None), None)
        places = self.places(prompts, [mention.name for mention in mentions])
        gate = None if request is None else request.gate
        by_word = any((gate or self.words[mention.name].gate) == "word" for mention in mentions)
        if not all(places) and (by_word or (request is not None and request.regions)):
            where = f"prompt {quoted(prompts[0].text)}"
            raise PromptError(f"{where}: gates by word and regions need the words' places, and there is no tokenizer.")
        if request is None:
            return RowRequest(mentions, places, key_encoding)
        called = {name: own for own, name in request.names.items()}
        regions = tuple(request.regions.get(called.get(mention.name, mention.name)) for mention in mentions)
        return RowRequest(mentions, places, key_encoding, request.gate, regions)

    def _locks(self, mentions: tuple[Mention, ...], request: Request | None) -> bool:
        if request is not None and request.key_lock is not None:
            return request.key_lock == "global"
        return any(self.words[mention.name].global_lock for mention in mentions)


def _parts(result: Any, arguments: Mapping[str, Any]) -> Any:
    """The encodings of the prompt and of the negative one. InstructPix2Pix gives one tensor: prompts, negatives, negatives; PixArt
    gives each with its mask behind it."""
    if not isinstance(result, Tensor):
        return (result[0], result[2]) if "prompt_attention_mask" in arguments else result
    rows = len(result) // 3 if arguments.get("do_classifier_free_guidance") else len(result)
    return result[:rows], result[rows : 2 * rows]


def _embeddings(encoder: Any) -> list[torch.nn.Module]:
    """The modules that turn ids into input embeddings: T5 has two of one weight, and calls the second."""
    own = plain_module(encoder).get_input_embeddings()
    tied = (each for each in plain_module(encoder).modules() if isinstance(each, torch.nn.Embedding) and each.weight is own.weight)
    return list(dict.fromkeys((own, *tied)))


def _in_chunks(places: tuple[int, ...], size: int, length: int) -> tuple[int, ...]:
    """Where words of a long prompt stand that was encoded in pieces of `size` tokens, each with a start and an end of its own."""
    inner = size - 2
    moved = tuple((place - 1) // inner * size + 1 + (place - 1) % inner if length > size else place for place in places)
    if any(place >= length for place in moved):
        raise PromptError(f"a concept's word stands at token {max(moved)}, and the encoding has {length}.")
    return moved


def added_tokens(pipe: Any) -> set[str]:
    """The words that the pipeline's tokenizers have beyond their training: special ones and textual inversions."""
    return set().union(*(tokenizer.get_added_vocab() for tokenizer, _ in text_encoders(pipe, required=False)))


def superclass_tokens(tokenizer: Any, word: str) -> list[int]:
    """The ids of a superclass, a word or several ("coffee mug"). The concept stands at the last of them. ValueError when there are none.

    In a causal text encoder the last token alone has read the whole word, and in English the last word says what the thing is: so
    the concept's embedding replaces the last token's, i* and s are encodings there, and the tokens before it stay as they are.
    """
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if not ids or tokenizer.unk_token_id in ids:
        raise ValueError(f"superclass {word!r} holds nothing that this model's tokenizer knows. Give a word for what the thing is.")
    if len(ids) > MOST_TOKENS:
        raise ValueError(f"superclass {word!r} is {len(ids)} tokens long; at most {MOST_TOKENS} are read as one. Give a shorter name.")
    return ids


def warn_of_unknown_word(tokenizer: Any, word: str) -> None:
    """Warn where a superclass falls into so many pieces that the model can hardly know it, as words do that a small vocabulary lacks."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) > PIECES * len(word.split()):
        pieces = ", ".join(tokenizer.convert_ids_to_tokens(ids))
        known = [repr(each) for each in _NOUNS if len(tokenizer(each, add_special_tokens=False).input_ids) == 1][:3]
        such = f", such as {' or '.join(filter(None, [', '.join(known[:-1]), known[-1]]))}" if known else ""
        warnings.warn(
            f"superclass {word!r} becomes {len(ids)} tokens ({pieces}), so this model hardly knows the word. A word that it knows for "
            f"what the thing is makes a better start{such}.",
            stacklevel=4,
        )
