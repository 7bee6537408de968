"""What the tests of the hook share: concepts over a known covariance, the edit written out, and what attention really saw.

    concept = make_concept(base, "teddy", seed=1)
    with watch(pipe.unet) as forwards:
        pipe("a <teddy>")
    check_rows(pipe.unet, forwards[0], [[], [use(concept)]])      # guidance: [negative, positive]
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from perfusion.attention_processor import ConceptAttnProcessor
from perfusion.base import Base, cross_attention_layers, denoiser, project_text
from perfusion.concept import Concept
from perfusion.handle import Handle, attach
from perfusion_kernels.reference.edited_attention import edited
from tests.kernels.tolerance import ROUNDINGS, assert_close, exactly

STEPS = 2
PROMPTS, PLAIN = ["a photo of a <teddy> on a beach", "a cat"], ["a photo of a teddy on a beach", "a cat"]


@functools.cache
def inverse_covariance(width: int) -> Tensor:
    """One well conditioned C⁻¹ [width, width] in float64 for every concept of that width."""
    root = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    return torch.linalg.inv(root @ root.T / width + 0.3 * torch.eye(width, dtype=torch.float64))


def make_concept(base: Base, name: str = "teddy", *, seed: int = 1, unlocked: bool = False, **fields) -> Concept:
    """A random concept whose gate is neither open nor shut at most tokens."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, generator=generator)

    target = numbers(base.encoding_dim)
    own = dict(
        superclass=name,
        base=base,
        value_outputs=numbers(base.outputs, 0.5),
        target=target,
        metric_target=(inverse_covariance(base.encoding_dim) @ target.double()).float(),
        superclass_encoding=numbers(base.encoding_dim),
        word_embeddings=tuple(numbers(width, 0.1) for width in base.text_widths),
        key_outputs=numbers(base.outputs, 0.5) if unlocked else None,
        bias=0.3,
        temperature=0.4,
    )
    return Concept(name=name, **{**own, **fields})


@dataclasses.dataclass(frozen=True)
class Use:
    """A concept as one row uses it."""

    concept: Concept
    strength: float = 1.0
    bias: float | None = None
    temperature: float | None = None

    def gate(self, similarity: Tensor) -> Tensor:
        bias = self.concept.bias if self.bias is None else self.bias
        temperature = self.concept.temperature if self.temperature is None else self.temperature
        return torch.sigmoid((similarity - bias) / temperature)


use = Use


def written_out(e: Tensor, weight: Tensor, uses: Sequence[Use], outputs: Sequence[Tensor]) -> Tensor:
    """h [T, d] of one row e [T, D] and one layer, in float64, straight from arXiv 2305.01644: eq. 3 for one concept, else eq. 4."""
    e, weight, inverse = e.double(), weight.double(), inverse_covariance(e.shape[1])
    targets = [each.concept.target.double() for each in uses]
    similarities = [e @ inverse @ target / (target @ inverse @ target) for target in targets]
    if len(uses) == 1:
        (target,), (c,), (one,), (output,) = targets, similarities, uses, outputs
        edited = (e - torch.outer(c, target)) @ weight.T + torch.outer(one.gate(c), output.double())
        return (1 - one.strength) * (e @ weight.T) + one.strength * edited
    stacked = torch.stack(targets)
    components = torch.linalg.solve(stacked @ inverse @ stacked.T, stacked @ inverse @ e.T)  # [J, T]
    h = e @ weight.T
    for one, target, a, c, output in zip(uses, targets, components, similarities, outputs):
        h = h + one.strength * (torch.outer(one.gate(c), output.double()) - torch.outer(a, weight @ target))
    return h


@dataclasses.dataclass
class Forward:
    """One call of the denoiser: the encodings [R, T, D] that its layers read, and layer -> keys, values [R, T, d] in attention.

    fast: whether attention read them from the engine, and not from the layers' own projections.
    """

    encodings: Tensor
    fast: bool = False
    keys: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    values: dict[str, Tensor] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def watch(unet: torch.nn.Module) -> Iterator[list[Forward]]:
    """Record every forward of the UNet. Enter it after `attach`, so that it sees what the hooks made."""
    forwards: list[Forward] = []
    handles = []

    def record(kind, name):
        def hook(module, args, output):
            if not forwards[-1].fast:  # the engine calls projections too, between two forwards
                getattr(forwards[-1], kind)[name] = output.detach().clone()

        return hook

    def begin(module, args, kwargs):
        forwards.append(Forward(project_text(unet, kwargs["encoder_hidden_states"]).detach().clone()))
        end()  # the editor may have moved its hooks: stay behind them
        for name, layer in cross_attention_layers(unet).items():
            handles.append(layer.to_k.register_forward_hook(record("keys", name)))
            handles.append(layer.to_v.register_forward_hook(record("values", name)))

    def end():
        while handles:
            handles.pop().remove()

    beginning = unet.register_forward_pre_hook(begin, with_kwargs=True)
    ending = unet.register_forward_hook(lambda *arguments: end())  # projections with hooks would be called, not read
    names, own = list(cross_attention_layers(unet)), ConceptAttnProcessor.__call__

    def call(processor, attn, hidden_states, encoder_hidden_states=None, *rest, **options):
        state, layer = processor.state, processor.layer
        if state.form != "stock":
            forward, read = forwards[-1], _read(state, layer, attn, encoder_hidden_states)
            forward.fast = True
            forward.keys[names[layer]], forward.values[names[layer]] = (table.detach().clone() for table in read)
        return own(processor, attn, hidden_states, encoder_hidden_states, *rest, **options)

    ConceptAttnProcessor.__call__ = call
    try:
        yield forwards
    finally:
        ConceptAttnProcessor.__call__ = own
        beginning.remove()
        ending.remove()
        end()


def _read(state, layer, attn, encodings):
    """K and V [R, T, H d] as a layer's operator reads them, in every form."""
    if state.form == "fused":
        tables = attn.to_k.weight, attn.to_v.weight
        keys, values = (linear(encodings, weight).unflatten(-1, (attn.heads, -1)) for weight in tables)
    else:
        keys, values = state.keys[layer], state.values[layer]
    if state.form != "slots":
        edit = state.gates, state.components, state.index
        keys = edited(keys, *edit, state.key_outputs[layer], state.key_targets[layer])
        values = edited(values, *edit, state.value_outputs[layer], state.value_targets[layer])
    return (table.flatten(2) if state.slots is None else table[state.slots.long()].flatten(2) for table in (keys, values))


def weight_of(projection: torch.nn.Module) -> Tensor:
    """The weight that a projection stands for, LoRA included."""
    if not hasattr(projection, "base_layer"):
        return projection.weight
    weight = projection.base_layer.weight
    return weight if projection.merged else weight + sum(projection.get_delta_weight(adapter) for adapter in projection.active_adapters)


def guided(t):
    """Rows of PROMPTS behind their negative prompts, where the first prompt uses t."""
    return [[], [], t, []]


def unguided(t):
    """Rows of PROMPTS alone."""
    return [t, []]


def check_rows(
    unet: torch.nn.Module,
    forward: Forward,
    rows: Sequence[Sequence[Use]],
    *,
    keys: Mapping[int, Tensor] | None = None,
    roundings: float = ROUNDINGS,
) -> None:
    """Keys and values of every layer against the edit written out; a row without a concept must keep its very bits,
    on the fast path be as near.

    keys: row -> [T, D], the encoding that gives the row's keys instead (global lock).
    roundings: by how many of the forward's dtype they may differ; of float64, in which concepts stay float32, by one of theirs.
    """
    keys = keys or {}
    assert len(forward.encodings) == len(rows)
    for name, layer in cross_attention_layers(unet).items():
        for kind, projection in (("keys", layer.to_k), ("values", layer.to_v)):
            seen, weight = getattr(forward, kind)[name], weight_of(projection)
            bias = getattr(projection, "bias", None)
            for row, uses in enumerate(rows):
                if not uses:
                    if not forward.fast:
                        plain = projection(forward.encodings) if hasattr(projection, "base_layer") else linear(forward.encodings, weight, bias)
                        assert torch.equal(seen[row], plain[row]), f"{name}, {kind}, row {row}: no concept, yet other bits"
                        continue
                    encodings, uses = forward.encodings[row], ()
                elif kind == "keys" and row in keys:
                    encodings, uses = keys[row], ()
                else:
                    encodings = forward.encodings[row]
                outputs = [_output(use.concept, name, kind, weight) for use in uses]
                (exact,) = exactly(lambda: _edited(encodings, weight, bias, uses, outputs))
                if seen.dtype == torch.float64:
                    assert_close(seen[row].float(), exact, f"{name}, {kind}, row {row}", roundings=2)
                else:
                    assert_close(seen[row], exact, f"{name}, {kind}, row {row}", roundings)


def _edited(encodings: Tensor, weight: Tensor, bias: Tensor | None, uses: Sequence[Use], outputs: Sequence[Tensor]) -> Tensor:
    h = written_out(encodings, weight, uses, outputs) if uses else encodings.double() @ weight.double().T
    return h if bias is None else h + bias.double()


def _output(concept: Concept, layer: str, kind: str, weight: Tensor) -> Tensor:
    if kind == "values":
        return concept.value_output(layer)
    own = concept.key_output(layer)
    return weight.double() @ concept.superclass_encoding.double() if own is None else own


def draw(pipe, prompt=None, *, seed: int = 5, **options) -> Tensor:
    """Latents of a short run, the same noise at every call."""
    options = {"num_inference_steps": STEPS, "output_type": "latent", "generator": torch.Generator().manual_seed(seed), **options}
    return pipe(prompt, **options).images


def seen(pipe, prompt=None, **options):
    """What `draw` draws, and the forwards that `watch` recorded meanwhile."""
    with watch(denoiser(pipe)) as forwards:
        images = draw(pipe, prompt, **options)
    return images, forwards


def hooks_of(module: torch.nn.Module) -> dict[str, int]:
    """How many hooks every submodule has, where it has any."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_backward_hooks")
    counts = {name: sum(len(getattr(each, kind)) for kind in kinds) for name, each in module.named_modules()}
    return {name: count for name, count in counts.items() if count}


def lora(pipe, name: str = "style", seed: int = 3) -> None:
    """A LoRA on the text and image projections of a UNet that changes what it draws."""
    from peft import LoraConfig  # here, as benchmarks use this file too

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe.unet.add_adapter(config, name)


@contextlib.contextmanager
def attached_with_two(pipe, **options) -> Iterator[Handle]:
    """A pipeline, attached, with <teddy> and <teapot>."""
    with attach(pipe, **options) as handle:
        for seed, name in enumerate(("teddy", "teapot"), 1):
            handle.load(make_concept(handle.base, name, seed=seed))
        yield handle


@contextlib.contextmanager
def attached_to(pipe, concept: Concept) -> Iterator[Handle]:
    """A pipeline, attached, with the concept; a test that leaves a hook fails."""
    before, processors = hooks_of(pipe.text_encoder), pipe.unet.attn_processors
    with attach(pipe) as handle:
        handle.load(concept)
        yield handle
    assert hooks_of(pipe.text_encoder) == before and not hooks_of(pipe.unet)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in processors.items())
