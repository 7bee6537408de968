"""A concept for programs that know nothing of Perfusion: a LoRA of rank one per projection, and a textual inversion of its word.

With the gate g(e) replaced by κ c(e), which is linear in the encoding e, the edit of arXiv 2305.01644 (eq. 3) is a change of the weights:

    W_V e − c W_V i* + κ c o*_V = (W_V + up downᵀ) e,   down = m / ε,   up_V = κ o*_V − W_V i*,   up_K = κ W_K s − W_K i*

(c = m·e / ε; the key lock makes o*_K of s). κ is fitted on a caption corpus: the mean of (g − κ c)² at the concept's word plus that at all
other tokens is least at κ = (⟨g c⟩ + ⟨g c⟩) / (⟨c²⟩ + ⟨c²⟩). Were all tokens to count alike, the many others would outvote the word. What
is lost is the gate: it is nearly shut at all other words, where κ c is merely small.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perfusion.base import cross_attention_layers, denoiser, describe_base, text_encoders, text_projection
from perfusion.base.dense import dense_weight, embedding_rows
from perfusion.captions import everyday_captions
from perfusion.concept import Concept
from perfusion.convert import ConversionError
from perfusion.families import CUSTOM
from perfusion.files import whole
from perfusion.handle import attach
from perfusion.original_names import original_name
from perfusion.text import superclass_tokens

__all__ = ["EXPORTS", "Fit", "embedding_tensors", "export", "file_names", "fit_scale", "lora_tensors"]

EXPORTS = ("lora", "embedding", "a1111", "comfyui")
CAPTIONS = 256
_TEMPLATES = ("a {}", "a photo of a {}", "a picture of the {}", "{}")


@dataclasses.dataclass(frozen=True)
class Fit:
    """κ, and how far κ c(e) is from the gate: root mean squares relative to the gate's, word and other tokens counting as much, and
    those of both at either."""

    scale: float
    loss: float
    at_word: float
    gate_at_word: float
    elsewhere: float
    gate_elsewhere: float

    def __str__(self) -> str:
        return (
            f"κ = {self.scale:.3f}. Where the gate is {self.gate_at_word:.2f} at the concept's word and {self.gate_elsewhere:.3f} at other "
            f"words (root mean squares), the LoRA has {self.at_word:.2f} and {self.elsewhere:.3f}; relative loss {self.loss:.2f}."
        )


@torch.no_grad()
def fit_scale(concept: Concept, pipe: Any, *, captions: int = CAPTIONS) -> Fit:
    """The κ whose κ c(e) is nearest to the concept's gate at its default bias and temperature, over tokens of a caption corpus.

    Half of the captions hold the concept's word, half do not: a LoRA acts in both. The word's tokens weigh as much as all others.
    """
    tokenizer = text_encoders(pipe)[0][0]
    plain = [_known_words(text, tokenizer) for text in everyday_captions(captions)]
    named = [f"{_TEMPLATES[number % len(_TEMPLATES)].format(f'<{concept.name}>')}, {text}" for number, text in enumerate(plain)]
    similarities, at_word = [], []
    with attach(pipe) as handle:
        handle.load(concept)
        for texts in (named, plain):
            for start in range(0, len(texts), 32):
                batch = texts[start : start + 32]
                encodings = pipe.encode_prompt(
                    prompt=batch, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
                )[0]
                c = concept.similarity(encodings.float().cpu())
                for row, text in enumerate(batch):
                    prompt = handle._text.parse(text)
                    length = len(tokenizer(prompt.text, truncation=True, max_length=tokenizer.model_max_length).input_ids)
                    here = torch.zeros(length, dtype=torch.bool)
                    here[handle._text.read_at(0, text)] = True
                    similarities.append(c[row, :length])
                    at_word.append(here)
    c, here = torch.cat(similarities).double(), torch.cat(at_word)
    g = torch.sigmoid((c - concept.bias) / concept.temperature)

    def mean(values: Tensor) -> float:
        return float(values[here].mean() + values[~here].mean()) / 2

    def rms(values: Tensor) -> float:
        return float(values.square().mean().sqrt())

    scale = mean(g * c) / mean(c * c)
    loss = (mean((g - scale * c).square()) / mean(g * g)) ** 0.5
    return Fit(scale, loss, rms(scale * c[here]), rms(g[here]), rms(scale * c[~here]), rms(g[~here]))


def _known_words(caption: str, tokenizer: Any) -> str:
    """A caption without the words that its tokenizer takes to pieces: to a model of a small world those are letters that mean nothing."""
    words = re.findall(r"[\w'-]+", caption)
    return " ".join(word for word in words if len(tokenizer(word, add_special_tokens=False).input_ids) == 1)


def _check(concept: Concept, pipe: Any) -> None:
    reason = concept.base.mismatch(describe_base(pipe))
    if reason is not None:
        raise ConversionError(f"concept {concept.name!r} cannot be exported with this model: {reason}")
    if text_projection(denoiser(pipe)) is not None:
        raise ConversionError(
            f"concept {concept.name!r} is of a model that projects its text (as PixArt and Kolors do): no program loads a word for such "
            "a text encoder, and a LoRA without the word has nothing to act at. Draw with it in diffusers."
        )


@torch.no_grad()
def lora_tensors(concept: Concept, pipe: Any, scale: float) -> dict[str, tuple[Tensor, Tensor]]:
    """projection, such as "….attn2.to_v" -> (down [1, D], up [d, 1]) in float32. ConversionError for a concept whose keys were trained."""
    _check(concept, pipe)
    if concept.key_outputs is not None:
        raise ConversionError(
            f"concept {concept.name!r} has keys of its own, trained without the key lock; a LoRA of it is not made: "
            "its keys would act at every word of a prompt. Train with the key lock."
        )
    down = (concept.metric_target.double() / concept.energy).float()[None]
    tensors = {}
    for name, layer in cross_attention_layers(pipe.unet).items():
        for kind in ("to_k", "to_v"):
            weight = dense_weight(getattr(layer, kind)).float().cpu()
            output = weight @ concept.superclass_encoding.float() if kind == "to_k" else concept.value_output(name).float()
            tensors[f"{name}.{kind}"] = down, (scale * output - weight @ concept.target.float())[:, None]
    return tensors


def embedding_tensors(concept: Concept, pipe: Any) -> list[Tensor]:
    """The concept's word for each text encoder [n, width]: the superclass's own vectors, the last one exchanged for the learned one."""
    _check(concept, pipe)
    found = []
    for (tokenizer, encoder), word in zip(text_encoders(pipe), concept.word_embeddings):
        before = superclass_tokens(tokenizer, concept.superclass)[:-1]
        vectors = embedding_rows(encoder.get_input_embeddings(), before).float().cpu()
        found.append(torch.cat([vectors, word.float().cpu()[None]]))
    return found


def kohya_names(tensors: dict[str, tuple[Tensor, Tensor]], pipe: Any) -> dict[str, Tensor]:
    """Under the names of kohya's scripts, which most tools read."""
    original = len(text_encoders(pipe)) == 2
    named = {}
    for name, (down, up) in tensors.items():
        name = original_name(name, pipe.unet.config.layers_per_block) if original else name
        key = f"lora_unet_{name.replace('.', '_')}"
        named |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
    return named


def peft_names(tensors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Under the names of diffusers and peft."""
    return {f"unet.{name}.{key}.weight": each for name, pair in tensors.items() for key, each in zip(("lora_A", "lora_B"), pair)}


def file_names(concept: Concept, to: str) -> list[str]:
    """What `export` writes, under its folder. ConversionError for an unknown form."""
    if to not in EXPORTS:
        raise ConversionError(f"to must be one of {', '.join(EXPORTS)}, got {to!r}")
    name = concept.name
    if to in ("lora", "embedding"):
        return [f"{name}-embedding.safetensors", *([f"{name}-lora.safetensors"] if to == "lora" else [])]
    loras, embeddings = ("models/Lora", "embeddings") if to == "a1111" else ("models/loras", "models/embeddings")
    return [f"{embeddings}/{name}.safetensors", f"{loras}/{name}.safetensors"]


def export(
    concept: Concept, pipe: Any, to: str, folder: Path, *, scale: float | None = None, dtype: torch.dtype = torch.float16
) -> tuple[list[Path], list[str]]:
    """Write a concept for other programs; returns the files, and what is worth knowing, a sentence each.

    pipe: the base model, whose weights W are needed. to: "lora", for diffusers and peft; "embedding", the word alone; "a1111" and
    "comfyui", the files of these programs under the folders in which they look. scale: κ, by default fitted (`fit_scale`).
    ConversionError for a concept of another model, or with trained keys.
    """
    names, words, notes = file_names(concept, to), embedding_tensors(concept, pipe), []
    word = f"<{concept.name}>" if to in ("lora", "embedding") else "emb_params"
    files = {names[0]: dict(zip(CUSTOM.embeddings, words)) if len(words) == 2 else {word: words[0]}}
    if to != "embedding":
        if scale is None:
            fit = fit_scale(concept, pipe)
            scale = fit.scale
            notes.append(str(fit))
        tensors = lora_tensors(concept, pipe, scale)
        files[names[1]] = peft_names(tensors) if to == "lora" else kohya_names(tensors, pipe)
    name = concept.name
    notes.append({
        "lora": f"Prompts write <{name}>: load the embedding with load_textual_inversion, the LoRA with load_lora_weights.",
        "embedding": f"Prompts write <{name}>: load it with load_textual_inversion. Without the LoRA it is the learned word alone.",
        "a1111": f"Copy the folder's content into the program's. Prompts write {name} <lora:{name}:1>.",
        "comfyui": f"Copy the folder's content into the program's, load the LoRA in its node, and write embedding:{name} in prompts.",
    }[to])  # fmt: skip
    return [_write(folder / file, content, concept, dtype) for file, content in files.items()], notes


def _write(path: Path, tensors: dict[str, Tensor], concept: Concept, dtype: torch.dtype) -> Path:
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "modelspec.title": concept.name, "ss_network_dim": "1", "ss_network_alpha": "1"}
    metadata |= {key: value for key, value in (("modelspec.license", concept.license), ("modelspec.author", concept.author)) if value}
    content = {name: (each if name.endswith(".alpha") else each.to(dtype)).contiguous().clone() for name, each in tensors.items()}
    with whole(path) as draft:
        draft.write_bytes(save(content, metadata))
    return path
