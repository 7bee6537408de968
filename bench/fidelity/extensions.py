"""Forms of a concept that its file does not hold, to know what they would be worth: values of rank above one, several vectors a word,
a β per layer, and noise of their own for the values. Learned and drawn inside a training session, whose edit they change."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.fidelity.lab import Lab
from bench.fidelity.learning import Recipe, saved_bytes, session_of
from bench.fidelity.methods import Applied, Learned, Method
from bench.fidelity.subjects import Target
from perfusion.base import cross_attention_layers
from perfusion.edit import spread
from perfusion.projection_hooks import HookEdit
from perfusion.training.session import TrainingSession

__all__ = ["Extended", "Extension"]


@dataclasses.dataclass(frozen=True)
class Extension:
    """rank: of a layer's value update: with g the gate, o*_V + B Aᵀ(e − i*) in place of o*_V, B [O, rank − 1] and A [D, rank − 1] learned,
    at rank_rate.
    words: vectors of the word, all but the last as tokens before it. value_noise: the timesteps that o*_V learns from, as `Recipe.noise`,
    while the word learns from all. biases: β of the values of coarse and of fine layers, when pictures are drawn; keys keep the default."""

    rank: int = 1
    rank_rate: float = 0.001  # at 0.03, the values' rate, B outgrows o*_V and other captions lose the thing: identity 0.1
    words: int = 1
    value_noise: str = "all"
    biases: tuple[float, float] | None = None

    @property
    def plain(self) -> bool:
        """Whether an ordinary training learns it."""
        return (self.rank, self.words, self.value_noise) == (1, 1, "all")


class ExtendedSession(TrainingSession):
    """A training whose edit is extended. Projections are called one by one, so that the edit is whole."""

    extension = Extension()

    def __init__(self, pipe: Any, base: Any, config: Any, *given: Any):
        super().__init__(pipe, base, config, *given)
        self.tokens = [f"before-{config.name}-{number}" for number in range(1, self.extension.words)]
        if self.tokens:
            self.captions = [[_several(text, self.tokens, config.name) for text in texts] for texts in self.captions]
            self.table, self.others = _add_tokens(pipe, self.tokens, self.start_words[0])
        self.weights: Tensor | None = None  # [R] of the rows that values learn from, while a step runs
        self.sampling = False

    @torch.no_grad()
    def _start(self) -> None:
        super()._start()
        self._batched = None
        outputs, width, more = len(self.value_outputs), len(self.target), self.extension.rank - 1
        generator = torch.Generator().manual_seed(self.config.seed)
        self.down = torch.nn.Parameter(torch.randn(width, more, generator=generator).to(self.device) / width**0.5)
        self.up = torch.nn.Parameter(torch.zeros(outputs, more, device=self.device))
        added = [{"params": [self.down, self.up], "lr": self.extension.rank_rate}] if more else []
        if self.tokens:
            self.table.requires_grad_(True)
            added.append({"params": [self.table], "lr": self.config.word_learning_rate})
        for group in added:
            self.optimizer.add_param_group({**group, "weight_decay": 0.0})

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        found = dict(super()._trained())
        if self.extension.rank > 1:
            found |= {"down": self.down, "up": self.up}
        return found | ({"table": self.table} if self.tokens else {})

    def _learn_from(self, batch: Any, read: list[Tensor], share: float) -> Any:
        noise = self.extension.value_noise
        if noise != "all":
            total = self.noise_scheduler.config.num_train_timesteps
            late = batch.timesteps >= total // 3 if noise == "late" else batch.timesteps < total - total // 3
            self.weights = late.float() * len(late) / late.sum().clamp(min=1)
        try:
            return super()._learn_from(batch, read, share)
        finally:
            self.weights = None

    def _optimise(self, loss: float) -> float:
        norm = super()._optimise(loss)
        if self.tokens:  # all rows but the new ones are put back
            self.table.data[: len(self.others)] = self.others
        return norm

    def _edit(self, encodings: Tensor, rows: Tensor, bias: float, temperature: float) -> HookEdit:
        edit, extension = super()._edit(encodings, rows, bias, temperature), self.extension
        if extension.rank > 1:
            beside = (encodings[rows].float() - self.target) @ self.down
            edit.value_updates = edit.value_updates + (edit.gates * (beside @ self.up.T)).to(edit.value_updates)
        if self.weights is not None:  # the same update, of which values learn row by row, and words from all
            index = torch.zeros(len(rows), 1, dtype=torch.int32, device=self.device)
            values = spread(edit.gates.detach(), self.value_outputs[None], index) * self.weights[:, None, None]
            words = spread(edit.gates, self.value_outputs[None].detach(), index)
            edit.value_updates = (values - values.detach() + words).to(edit.value_updates)
        if extension.biases is not None and self.sampling:
            edit.value_updates = self._by_layer(encodings, rows, temperature)
        return edit

    def _by_layer(self, encodings: Tensor, rows: Tensor, temperature: float) -> Tensor:
        layers = [layer.to_v.out_features for layer in cross_attention_layers(self._model).values()]
        parts = []
        coarse, fine = (TrainingSession._edit(self, encodings, rows, bias, temperature).value_updates for bias in self.extension.biases)
        for width, *pair in zip(layers, coarse.split(layers, -1), fine.split(layers, -1)):
            parts.append(pair[0 if width == max(layers) else 1])
        return torch.cat(parts, -1)


def _several(caption: str, tokens: list[str], name: str) -> str:
    return caption.replace(f"<{name}>", " ".join([*tokens, f"<{name}>"]))


def _add_tokens(pipe: Any, tokens: list[str], start: Tensor) -> tuple[torch.nn.Parameter, Tensor]:
    """Tokens of the superclass's embedding at the end of the vocabulary; the table, and its rows as they were."""
    before = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    pipe.tokenizer.add_tokens(tokens)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    table = pipe.text_encoder.get_input_embeddings().weight
    rows = min(len(before), len(pipe.tokenizer) - len(tokens))
    table.data[rows:] = start.to(table)
    return table, before[:rows]


@dataclasses.dataclass
class Extended(Method):
    """This project with an extension. Its file would hold what a concept's does and the further numbers, in half precision."""

    name: str
    extension: Extension
    joint = False
    combines = False

    def learn(self, lab: Lab, target: Target) -> Learned:
        kind = dataclasses.asdict(dataclasses.replace(self.extension, biases=None))
        key = {"target": dataclasses.asdict(target), "extension": kind, "steps": lab.scale.steps, "batch": lab.scale.batch}
        return Learned(target, *lab.remembered("extended", key, lambda folder: self._learn(lab, target, folder)))

    def _learn(self, lab: Lab, target: Target, folder: Path) -> dict[str, Any]:
        with self._session(lab, target) as session:
            memory, started = saved_bytes(session), time.process_time()
            while session.step < session.config.steps:
                session.train_step()
            seconds, concept, state = time.process_time() - started, session.concept(), session.state()
        concept.save(folder / "concept.safetensors")
        kept = {name: tensor for name, tensor in state.items() if not name.startswith("adam.")}
        save_file(kept, folder / "state.safetensors")
        plain = sum(kept[name].numel() for name in kept if name == "value_outputs" or name.startswith("word."))
        more = (self.extension.rank - 1) * (len(session.value_outputs) + len(session.target))
        more += (self.extension.words - 1) * session.words[0].numel()
        size = (folder / "concept.safetensors").stat().st_size + 2 * more
        return {"seconds": seconds, "steps": session.step, "bytes": size, "trained": plain + more, "memory": memory}

    def _session(self, lab: Lab, target: Target) -> ExtendedSession:
        from bench.fidelity.peers import copied

        kind = type("Session", (ExtendedSession,), {"extension": self.extension})
        return session_of(lab, target, Recipe(), kind, pipe=copied(lab.pipe))

    @contextlib.contextmanager
    def applied(self, lab: Lab, learned: Sequence[Learned]) -> Iterator[Applied]:
        one = learned[0]
        with self._session(lab, one.target) as session, torch.no_grad():
            state = load_file(one.path / "state.safetensors")
            session.superclass_encoding = state["superclass_encoding"].to(session.device)
            for name, parameter in session._trained().items():
                parameter.data.copy_(state[name])
            session.target, session.sampling = session.settled_target(), True  # as in a file
            yield Applied(session.pipe, [" ".join([*session.tokens, f"<{one.target.name}>"])])
