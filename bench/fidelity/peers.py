"""Everybody else, each by the library that its users have: diffusers' recipes, peft's adapters, perfusion-pytorch's module.

All learn from the same pictures and captions, with the same seeds, for as many processor seconds as our training of the same thing took.
Rates are those of each recipe, times what toybox needs (`rate`): its embeddings and weights are larger than those of Stable Diffusion.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.fidelity.lab import Lab
from bench.fidelity.learning import Recipe, concept_of, kept_for_backward
from bench.fidelity.methods import Applied, Learned, Method
from perfusion.base import cross_attention_layers
from perfusion.concept import Concept
from perfusion.other_formats import export
from perfusion.toybox.words import SCENES
from perfusion.training.data import encode_pictures, read_pictures
from perfusion.training.session import _noise_scheduler
from perfusion.training_config import TrainingConfig

__all__ = ["Absent", "peers"]

PRIOR = 12  # pictures of the class, by the model itself, where a recipe wants them
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]


class Absent(RuntimeError):
    """A peer that cannot be measured here; the message says why."""


@dataclasses.dataclass
class Peer(Method):
    """A method that trains a copy of the pipeline. `start` makes the copy trainable and returns its parameter groups, `save` writes what
    was learned, `load` puts it into another copy. token: whether a word of its own is trained; else prompts say "sks" and the class."""

    name: str
    start: Callable[[Any], list[dict[str, Any]]]
    save: Callable[[Any, Path], None]
    load: Callable[[Any, Path, str], None]
    token: bool = False
    token_rate: float = 0.0
    prior: bool = False
    combines: bool = False
    note: str = ""
    joint = False

    def word(self, target: Any) -> str:
        return f"<own-{target.name}>" if self.token else f"sks {target.subject.superclass}"

    def learn(self, lab: Lab, target: Any) -> Learned:
        seconds = concept_of(lab, target, Recipe())[1]["seconds"]
        key = {"peer": self.name, "note": self.note, "target": dataclasses.asdict(target), "seconds": seconds, "batch": lab.scale.batch}
        return Learned(target, *lab.remembered("peers", key, lambda folder: self._learn(lab, target, seconds, folder)))

    def _learn(self, lab: Lab, target: Any, seconds: float, folder: Path) -> dict[str, Any]:
        pipe = copied(lab.pipe)
        own = add_token(pipe, self.word(target), target.subject.superclass) if self.token else None
        groups = self.start(pipe)
        restore = None
        if own is not None:
            groups = [*groups, {"params": [own[0]], "lr": self.token_rate}]
            restore = own[1]
        facts = fit(lab, pipe, target, self.word(target), groups, seconds, prior=self.prior, after=restore)
        self.save(pipe, folder)
        if self.token:
            row = pipe.tokenizer.convert_tokens_to_ids(self.word(target))
            vector = pipe.text_encoder.get_input_embeddings().weight[row].detach().half().clone()
            save_file({self.word(target): vector[None]}, folder / "learned_embeds.safetensors")
            facts["trained"] += vector.numel() - own[0].numel()  # its row alone, for the others are put back after each step
        size = sum(path.stat().st_size for path in folder.iterdir() if path.name != "facts.json")
        return {**facts, "bytes": size, "note": self.note}

    @contextlib.contextmanager
    def applied(self, lab: Lab, learned: Sequence[Learned]) -> Iterator[Applied]:
        pipe = copied(lab.pipe)
        for number, each in enumerate(learned):
            if self.token:
                pipe.load_textual_inversion(str(each.path / "learned_embeds.safetensors"), token=self.word(each.target))
            self.load(pipe, each.path, f"adapter{number}")
        if len(learned) > 1 and getattr(pipe.unet, "peft_config", None):
            pipe.set_adapters([f"adapter{number}" for number in range(len(learned))])
        pipe.unet.eval()
        yield Applied(pipe, [self.word(each.target) for each in learned])


def copied(pipe: Any) -> Any:
    own = type(pipe)(**copy.deepcopy(pipe.components), requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    for model in (own.unet, own.vae, own.text_encoder):
        model.requires_grad_(False).eval()
    return own


def add_token(pipe: Any, token: str, superclass: str) -> tuple[torch.nn.Parameter, Callable[[], None]]:
    """diffusers' recipe of textual inversion: the whole table is optimised, and all rows but the new one are put back after each step."""
    pipe.tokenizer.add_tokens([token])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    table = pipe.text_encoder.get_input_embeddings().weight
    new, first = (pipe.tokenizer.convert_tokens_to_ids(word) for word in (token, f"{superclass}</w>"))
    table.data[new] = table.data[first]
    before = table.detach().clone()
    table.requires_grad_(True)

    def restore() -> None:
        own = table.data[new].clone()
        table.data.copy_(before)
        table.data[new] = own

    return table, restore


def fit(
    lab: Lab, pipe: Any, target: Any, word: str, groups: list[dict[str, Any]], seconds: float, *, prior: bool,
    after: Callable[[], None] | None,
    encode: Callable[[list[str]], Tensor] | None = None, weight_decay: float = 1e-2,
) -> dict[str, Any]:  # fmt: skip
    """The loop of diffusers' example scripts: AdamW on the mean square error, here until the processor time is spent.

    prior: half of each batch are pictures of the class by the model itself. encode: captions -> encodings, by default the pipeline's.
    """
    from bench.fidelity.running import base_pictures

    superclass = target.subject.superclass
    config = TrainingConfig(superclass=superclass, name=target.name, flip=0.0)
    pictures = read_pictures(lab.references(target), config, pipe.unet.config.sample_size * pipe.vae_scale_factor, None, step=4)
    stored, scheduler = encode_pictures(pipe, pictures), _noise_scheduler(pipe)
    latents, captions = stored.mean[:, 0], [list(picture.captions) for picture in pictures]
    if prior:
        texts = [f"a {superclass} {list(SCENES.values())[number % len(SCENES)]}" for number in range(PRIOR)]
        images = base_pictures(lab, texts, range(5000, 5000 + PRIOR)).to(lab.device)
        encoded = pipe.vae.encode(images * 2 - 1)
        others = (encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents) * pipe.vae.config.scaling_factor
        others = others.detach()
    trained = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
    encode = encode or (lambda texts: pipe.encode_prompt(texts, lab.device, 1, False)[0])

    def loss_of(step: int, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        picks = torch.randint(len(latents), (batch,), generator=generator)
        texts = [
            captions[pick][int(torch.randint(len(captions[pick]), (), generator=generator))].replace("{}", word) for pick in picks.tolist()
        ]
        clean = latents[picks]
        if prior:
            half = batch // 2
            own = torch.randint(PRIOR, (half,), generator=generator)
            clean = torch.cat([clean[: batch - half], others[own]])
            texts = texts[: batch - half] + [texts_of_class[pick] for pick in own.tolist()]
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        times = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator).to(clean.device)
        kind = scheduler.config.prediction_type
        goal = scheduler.get_velocity(clean, noise, times) if kind == "v_prediction" else noise if kind == "epsilon" else clean
        found = pipe.unet(scheduler.add_noise(clean, noise, times), times, encode(texts), return_dict=False)[0]
        return torch.nn.functional.mse_loss(found, goal)

    texts_of_class = texts if prior else []
    memory = kept_for_backward(lambda: loss_of(0, 1).backward()) + 16 * sum(parameter.numel() for parameter in trained)
    optimizer.zero_grad()
    started, step = time.process_time(), 0
    while time.process_time() - started < seconds or step == 0:
        optimizer.zero_grad()
        loss_of(step, lab.scale.batch).backward()
        optimizer.step()
        if after is not None:
            after()
        step += 1
    numbers = sum(parameter.numel() for parameter in trained)
    return {"seconds": time.process_time() - started, "steps": step, "trained": numbers, "memory": memory}


# what each trains, and its files


def nothing(*arguments: Any) -> list[dict[str, Any]]:
    return []


def whole(rate: float) -> Peer:
    def start(pipe: Any) -> list[dict[str, Any]]:
        pipe.unet.requires_grad_(True)
        return [{"params": list(pipe.unet.parameters()), "lr": rate}]

    def save(pipe: Any, folder: Path) -> None:
        pipe.unet.half().save_pretrained(folder)

    def load(pipe: Any, folder: Path, adapter: str) -> None:
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        pipe.unet.load_state_dict({name: tensor.float() for name, tensor in weights.items()})

    return Peer("DreamBooth, the whole UNet", start, save, load, prior=True, note=f"AdamW at {rate:g}, prior preservation")


def lora(rate: float, token_rate: float = 0.0) -> Peer:
    def start(pipe: Any) -> list[dict[str, Any]]:
        from peft import LoraConfig

        pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=ATTENTION))
        return [{"params": [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad], "lr": rate}]

    def save(pipe: Any, folder: Path) -> None:
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
        type(pipe).save_lora_weights(folder, unet_lora_layers={name: tensor.half() for name, tensor in layers.items()})

    def load(pipe: Any, folder: Path, adapter: str) -> None:
        pipe.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors", adapter_name=adapter)

    name = "LoRA, rank 4" + (", and a word (pivotal tuning)" if token_rate else "")
    return Peer(name, start, save, load, token=bool(token_rate), token_rate=token_rate, combines=True, note=f"AdamW at {rate:g}")


def adapter(name: str, make: Callable[[], Any], rate: float) -> Peer:
    """Another of peft's adapters in the attention layers, with "sks" and the class."""

    def start(pipe: Any) -> list[dict[str, Any]]:
        from peft import inject_adapter_in_model

        inject_adapter_in_model(make(), pipe.unet, adapter_name="default")
        return [{"params": [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad], "lr": rate}]

    def save(pipe: Any, folder: Path) -> None:
        from peft import get_peft_model_state_dict

        save_file(
            {key: tensor.half().contiguous() for key, tensor in get_peft_model_state_dict(pipe.unet).items()},
            folder / "adapter.safetensors",
        )

    def load(pipe: Any, folder: Path, _: str) -> None:
        from peft import inject_adapter_in_model, set_peft_model_state_dict

        inject_adapter_in_model(make(), pipe.unet, adapter_name="default")
        weights = {key: tensor.float() for key, tensor in load_file(folder / "adapter.safetensors").items()}
        unexpected = set_peft_model_state_dict(pipe.unet, weights).unexpected_keys
        if unexpected:
            raise RuntimeError(f"{name}: peft does not know {unexpected[:3]}")

    return Peer(name, start, save, load, note=f"AdamW at {rate:g}")


def custom_diffusion(rate: float, token_rate: float) -> Peer:
    def start(pipe: Any) -> list[dict[str, Any]]:
        from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

        processors = {}
        layers = {name: module for name, module in pipe.unet.named_modules() if hasattr(module, "to_k")}
        for name, layer in layers.items():
            cross = layer.to_k.in_features if layer.is_cross_attention else None
            own = CustomDiffusionAttnProcessor(
                train_kv=cross is not None, train_q_out=False, hidden_size=layer.to_q.in_features, cross_attention_dim=cross
            )
            if cross is not None:
                own.load_state_dict({f"{kind}_custom_diffusion.weight": getattr(layer, kind).weight for kind in ("to_k", "to_v")})
            processors[f"{name}.processor"] = own
        trained = [parameter for own in processors.values() for parameter in own.parameters()]
        pipe.unet.set_attn_processor(processors)  # which empties the dict
        return [{"params": trained, "lr": rate}]

    def weights(pipe: Any) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in pipe.unet.state_dict().items() if "custom_diffusion" in name}

    def save(pipe: Any, folder: Path) -> None:
        save_file({name: tensor.half().contiguous() for name, tensor in weights(pipe).items()}, folder / "custom_diffusion.safetensors")

    def load(pipe: Any, folder: Path, _: str) -> None:
        start(pipe)
        state = {name: tensor.float() for name, tensor in load_file(folder / "custom_diffusion.safetensors").items()}
        pipe.unet.load_state_dict(state, strict=False)

    return Peer(
        "Custom Diffusion, K and V",
        start,
        save,
        load,
        token=True,
        token_rate=token_rate,
        prior=True,
        note=f"AdamW at {rate:g}, prior preservation",
    )


@dataclasses.dataclass
class Converted(Method):
    """What `perfusion convert --to lora` makes of a concept, loaded by diffusers and peft alone."""

    name: str = "our concept as a LoRA of rank 1"
    joint = False
    combines = True

    def learn(self, lab: Lab, target: Any) -> Learned:
        path, facts = concept_of(lab, target, Recipe())

        def make(folder: Path) -> dict[str, Any]:
            export(Concept.load(path), lab.pipe, "lora", folder)
            return {"bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}

        folder, own = lab.remembered("converted", {"concept": str(path.parent.name)}, make)
        return Learned(target, folder, {**facts, "bytes": own["bytes"]})

    @contextlib.contextmanager
    def applied(self, lab: Lab, learned: Sequence[Learned]) -> Iterator[Applied]:
        pipe = copied(lab.pipe)
        for number, each in enumerate(learned):
            name = each.target.name
            pipe.load_textual_inversion(str(each.path / f"{name}-embedding.safetensors"), token=f"<{name}>")
            pipe.load_lora_weights(str(each.path), weight_name=f"{name}-lora.safetensors", adapter_name=f"adapter{number}")
        pipe.set_adapters([f"adapter{number}" for number in range(len(learned))])
        yield Applied(pipe, [f"<{each.target.name}>" for each in learned])


@dataclasses.dataclass
class PerfusionPytorch(Method):
    """perfusion-pytorch's `Rank1EditModule` in place of every `to_k` and `to_v`, its value outputs and a word trained at the paper's rates.

    Its own list of parameters holds the locked keys' outputs and no values, so the values are given to the optimiser by hand.
    """

    name: str = "perfusion-pytorch's module"
    joint = False
    combines = False

    def _module(self) -> Any:
        try:
            importlib.import_module("open_clip")
        except ImportError:  # for its text encoder alone, which is not used here
            sys.modules["open_clip"] = types.ModuleType("open_clip")
            sys.modules["open_clip"].tokenizer = types.SimpleNamespace(tokenize=None)
        try:
            return importlib.import_module("perfusion_pytorch.perfusion")
        except ImportError as error:
            raise Absent(f"perfusion-pytorch cannot be imported here: {error}") from None

    def _wrapped(self, lab: Lab, pipe: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        kind, now, found = self._module().Rank1EditModule, {}, {}
        covariance = lab.covariance.matrix.float()

        class Projection(torch.nn.Module):
            def __init__(self, linear: Any, key: bool):
                super().__init__()
                self.edit = kind(linear, is_key_proj=key, C=covariance, text_seq_len=pipe.tokenizer.model_max_length)

            def forward(self, encodings: Tensor) -> Tensor:
                with torch.autocast(encodings.device.type, enabled=False):  # its einsums take no two dtypes
                    return self.edit(encodings.float(), **(now if self.edit.training else {}))

        for name, layer in cross_attention_layers(pipe.unet).items():
            for projection in ("to_k", "to_v"):
                own = Projection(getattr(layer, projection), projection == "to_k")
                setattr(layer, projection, own)
                found[f"{name}.{projection}"] = own.edit
        return found, now

    def learn(self, lab: Lab, target: Any) -> Learned:
        self._module()
        seconds = concept_of(lab, target, Recipe())[1]["seconds"]
        key = {"peer": self.name, "target": dataclasses.asdict(target), "seconds": seconds, "batch": lab.scale.batch}
        return Learned(target, *lab.remembered("peers", key, lambda folder: self._learn(lab, target, seconds, folder)))

    def _learn(self, lab: Lab, target: Any, seconds: float, folder: Path) -> dict[str, Any]:
        pipe, word, superclass = copied(lab.pipe), f"<own-{target.name}>", target.subject.superclass
        table, restore = add_token(pipe, word, superclass)
        edits, now = self._wrapped(lab, pipe)
        for edit in edits.values():
            edit.train()
        place = pipe.tokenizer.convert_tokens_to_ids(word)

        def encode(texts: list[str]) -> Tensor:
            ids = pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
            with torch.no_grad():
                plain = pipe.encode_prompt([text.replace(word, superclass) for text in texts], lab.device, 1, False)[0]
            now.clear()
            now.update(concept_indices=(ids == place).int().argmax(1), text_enc_with_superclass=plain)
            return pipe.encode_prompt(texts, lab.device, 1, False)[0]

        values = [edit.concept_outputs.requires_grad_(True) for edit in edits.values() if not edit.is_key_proj]
        groups = [{"params": values, "lr": 0.03}, {"params": [table], "lr": 0.006}]
        facts = fit(lab, pipe, target, word, groups, seconds, prior=False, after=restore, encode=encode, weight_decay=0.0)
        state = {
            f"{name}.{key}": getattr(edit, key).detach().clone()
            for name, edit in edits.items()
            for key in ("concept_outputs", "ema_concept_text_encs")
        }
        save_file({name: tensor.half() for name, tensor in state.items()}, folder / "edits.safetensors")
        save_file({word: table[place].detach().half()[None].clone()}, folder / "learned_embeds.safetensors")
        size = sum(path.stat().st_size for path in folder.iterdir() if path.name != "facts.json")
        facts["trained"] += table.shape[1] - table.numel()
        return {**facts, "bytes": size, "note": "values given to the optimiser by hand"}

    @contextlib.contextmanager
    def applied(self, lab: Lab, learned: Sequence[Learned]) -> Iterator[Applied]:
        pipe, one = copied(lab.pipe), learned[0]
        word = f"<own-{one.target.name}>"
        pipe.load_textual_inversion(str(one.path / "learned_embeds.safetensors"), token=word)
        edits, _ = self._wrapped(lab, pipe)
        state = load_file(one.path / "edits.safetensors")
        for name, edit in edits.items():
            for key in ("concept_outputs", "ema_concept_text_encs"):
                getattr(edit, key).data.copy_(state[f"{name}.{key}"].float())
            edit.initted.fill_(True)
            edit.eval()
        yield Applied(pipe, [word])


@dataclasses.dataclass
class Missing(Method):
    name: str
    reason: str

    def learn(self, lab: Lab, target: Any) -> Learned:
        raise Absent(self.reason)


def peers() -> list[Method]:
    """Everybody, those that are asked for most first. What a recipe's rate is multiplied by for toybox stands beside it."""

    def loha() -> Any:
        from peft import LoHaConfig

        return LoHaConfig(r=4, alpha=4, target_modules=ATTENTION)

    def oft() -> Any:
        from peft import OFTConfig

        return OFTConfig(oft_block_size=16, target_modules=ATTENTION)

    word = 0.02  # 5e-4 × batch 4, and toybox's embeddings are some ten times as large as CLIP's
    return [
        Peer("Textual Inversion", nothing, nothing, nothing, token=True, token_rate=word, combines=True, note=f"AdamW at {word:g}"),
        lora(1e-3),
        whole(2e-4),
        custom_diffusion(3e-4, word),
        lora(1e-3, token_rate=word),
        Converted(),
        adapter("OFT, blocks of 16", oft, 1e-3),
        adapter("LoHa, rank 4", loha, 1e-3),
        PerfusionPytorch(),
        Missing("SVDiff", "no library of it is published on PyPI"),
    ]
