"""One training in progress: the learned vectors, the step, and the concept they make.

Everything random in a step comes from a generator seeded with (seed, step), so a run that is continued from a checkpoint
draws what the uninterrupted run would have drawn.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import torch
from torch import Tensor

from perfusion.base import Base, cross_attention_layers, text_encoders
from perfusion.concept import Concept
from perfusion.covariance import Covariance
from perfusion.editor import Edit, Editor, Tables, make_edit
from perfusion.masks import masked_loss
from perfusion.text import TextHook, Word, single_token
from perfusion.training.config import TrainingConfig
from perfusion.training.data import Latents, Picture

__all__ = ["Measures", "TrainingSession"]

HALF_SCALE = 1024.0  # the loss is scaled where activations are float16; AdamW does not see a constant factor


@dataclasses.dataclass
class Measures:
    """What one step reports: see the training log in DESIGN.md. Gates are means over the batch."""

    loss: float
    gradient_norm: float
    gate_on_word: float
    gate_off_word: float
    superclass_cosine: float


class TrainingSession:
    """Hooks on a pipeline whose `<name>` is being learned, from `begin` to `end`.

    value_outputs, key_outputs [O] float32 (keys: None under the lock) and `words`, one [width] float32 per text encoder, are
    what is trained; `target` [D] is i*, the running mean of the word's encoding; `superclass_encoding` [D] is s.
    """

    def __init__(self, pipe: Any, base: Base, config: TrainingConfig, covariance: Covariance, pictures: list[Picture], latents: Latents):
        self.pipe, self.base, self.config, self.covariance, self.latents = pipe, base, config, covariance, latents
        self.device = pipe._execution_device
        self.captions = [[caption.format(f"<{config.name}>") for caption in picture.captions] for picture in pictures]
        self.step = 0
        ids = [single_token(tokenizer, config.superclass) for tokenizer, _ in text_encoders(pipe)]
        embeddings = [encoder.get_input_embeddings().weight[i] for (_, encoder), i in zip(text_encoders(pipe), ids)]
        self.words = [torch.nn.Parameter(row.detach().to(self.device, torch.float32, copy=True)) for row in embeddings]
        self._text = TextHook(pipe, {config.name: Word(config.superclass, self.words)})
        self._editor = Editor(pipe.unet, self._sampling_edit)

    def begin(self) -> None:
        """Freeze the pipeline, install the hooks, and start every learned vector at its superclass."""
        self._frozen = [module for module in (self.pipe.unet, self.pipe.vae, *(e for _, e in text_encoders(self.pipe))) if module is not None]
        self._before = [(p, p.requires_grad) for module in self._frozen for p in module.parameters()]
        self._modes = [(module, module.training) for module in self._frozen]
        for module in self._frozen:
            module.requires_grad_(False).eval()
        if self.config.gradient_checkpointing:
            self.pipe.unet.enable_gradient_checkpointing()
            self.pipe.unet.train()  # diffusers checkpoints only what trains; these models have no dropout
        self._text.install()
        self._editor.install()
        with torch.no_grad():
            rows = [caption for captions in self.captions for caption in captions]
            encodings, _ = self._encode(sorted(set(rows)))
            positions = self._positions(sorted(set(rows)))
            s = encodings[torch.arange(len(encodings)), positions].float().mean(0)
            layers = cross_attention_layers(self.pipe.unet).values()
            probe = s.to(encodings.dtype)[None, None]
            start = {kind: torch.cat([getattr(layer, kind)(probe).flatten().float() for layer in layers]) for kind in ("to_k", "to_v")}
        self.superclass_encoding, self.target = s, s.clone()
        self.value_outputs = torch.nn.Parameter(start["to_v"])
        self.key_outputs = None if self.config.key_lock else torch.nn.Parameter(start["to_k"])
        outputs = [tensor for tensor in (self.value_outputs, self.key_outputs) if tensor is not None]
        self.optimizer = torch.optim.AdamW(
            [{"params": outputs, "lr": self.config.learning_rate}, {"params": self.words, "lr": self.config.word_learning_rate}],
            weight_decay=0.0,
        )

    def end(self) -> None:
        """Take the hooks off and give the pipeline back as it was."""
        self._editor.remove()
        self._text.remove()
        if self.config.gradient_checkpointing:
            self.pipe.unet.disable_gradient_checkpointing()
        for parameter, required in self._before:
            parameter.requires_grad_(required)
        for module, training in self._modes:
            module.train(training)

    # one step

    def train_step(self) -> Measures:
        """One optimiser step over `batch_size` draws of picture, mirror, caption, noise and timestep."""
        batch = self.config.batch_size
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.config.seed} {self.step}".encode()))
        pictures = torch.randint(len(self.captions), (batch,), generator=generator)
        mirrored = (torch.rand(batch, generator=generator) < self.config.flip).long()
        picks = torch.rand(batch, generator=generator).tolist()
        captions = [self.captions[p][int(pick * len(self.captions[p]))] for p, pick in zip(pictures.tolist(), picks)]
        latents = self.latents.mean[pictures, mirrored]
        if self.latents.std is not None:
            latents = latents + self.latents.std[pictures, mirrored] * torch.randn(latents.shape, generator=generator).to(latents)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        timesteps = torch.randint(self.pipe.scheduler.config.num_train_timesteps, (batch,), generator=generator).to(self.device)
        mask = None if self.latents.mask is None else self.latents.mask[pictures, mirrored]

        distinct = sorted(set(captions))  # each caption is encoded once, however often it was drawn
        rows = torch.tensor([distinct.index(caption) for caption in captions], device=self.device)
        encodings, extra = self._encode(distinct)
        positions = self._positions(distinct)
        self._move_target(encodings[torch.arange(len(distinct)), positions].detach().float()[rows].mean(0))
        encodings = encodings[rows]
        edit = self._edit(encodings, torch.arange(batch, device=self.device), self.config.bias, self.config.temperature)
        self._editor.forget()
        self._editor.use(encodings, edit)

        noisy = self.pipe.scheduler.add_noise(latents, noise, timesteps)
        conditions = {name: value[rows] for name, value in extra.items()}
        prediction = self.pipe.unet(
            noisy.to(encodings.dtype), timesteps, encodings, added_cond_kwargs=conditions or None, return_dict=False
        )[0]
        loss = masked_loss(prediction.float(), self._goal(latents, noise, timesteps), mask).mean()
        norm = self._optimise(loss, encodings.dtype)
        self.step += 1
        return self._measure(loss, norm, edit, positions[rows])

    def _encode(self, captions: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Encodings [n, T, D] of captions, and SDXL's pooled text and sizes."""
        result = self.pipe.encode_prompt(prompt=captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        if len(text_encoders(self.pipe)) == 1:
            return result[0], {}
        side = self.latents.mean.shape[-1] * self.pipe.vae_scale_factor
        sizes = torch.tensor([side, side, 0, 0, side, side], dtype=result[0].dtype, device=self.device)
        return result[0], {"text_embeds": result[2], "time_ids": sizes.expand(len(captions), -1)}

    def _positions(self, captions: list[str]) -> Tensor:
        """Where each caption names the concept [n]."""
        tokenizer = text_encoders(self.pipe)[0][0]
        prefixes = [self._text.parse(caption).mentions[0].prefix for caption in captions]
        lengths = [len(tokenizer(prefix, add_special_tokens=False).input_ids) if prefix.strip() else 0 for prefix in prefixes]
        return torch.tensor(lengths, device=self.device) + 1

    def _move_target(self, encoding: Tensor) -> None:
        # once per optimiser step, outside the layers: inside, checkpointing and accumulation would move it more often
        self.target = torch.lerp(encoding, self.target, self.config.ema_decay)

    def _edit(self, encodings: Tensor, rows: Tensor, bias: float, temperature: float) -> Edit:
        tables = Tables(
            self.target[None],
            self.covariance.metric_targets(self.target[None].cpu()).to(self.target),
            self.superclass_encoding[None],
            self.value_outputs[None],
            None if self.key_outputs is None else self.key_outputs[None],
            None if self.key_outputs is None else torch.ones(1, dtype=torch.bool, device=self.device),
        )
        whole = torch.ones(len(rows), 1, device=self.device)
        index = torch.zeros(len(rows), 1, dtype=torch.int32, device=self.device)
        return make_edit(encodings, rows, tables, index, whole * bias, whole * temperature, whole)

    def _goal(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        kind = self.pipe.scheduler.config.prediction_type
        if kind == "v_prediction":
            return self.pipe.scheduler.get_velocity(latents, noise, timesteps)
        return {"epsilon": noise, "sample": latents}[kind]

    def _optimise(self, loss: Tensor, dtype: torch.dtype) -> float:
        scale = HALF_SCALE if dtype == torch.float16 else 1.0
        self.optimizer.zero_grad()
        (loss * scale).backward()
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for parameter in trained:
            parameter.grad.div_(scale)
        norm = torch.linalg.vector_norm(torch.stack([parameter.grad.norm() for parameter in trained])).item()
        if not torch.isfinite(loss) or norm != norm or norm == float("inf"):
            raise FloatingPointError(
                f"training: the loss or its gradient is not finite at step {self.step} (loss {loss.item():g}, gradient {norm:g}). "
                "Use float32 or bfloat16 instead of float16, or a smaller learning rate."
            )
        self.optimizer.step()
        return norm

    @torch.no_grad()
    def _measure(self, loss: Tensor, norm: float, edit: Edit, positions: Tensor) -> Measures:
        gates = edit.gates[..., 0]
        on = torch.zeros_like(gates, dtype=torch.bool).scatter_(1, positions[:, None], True)
        cosine = torch.cosine_similarity(self.target, self.superclass_encoding, dim=0)
        return Measures(loss.item(), norm, gates[on].mean().item(), gates[~on].mean().item(), cosine.item())

    # what it makes

    def _sampling_edit(self, encodings: Tensor) -> Edit | None:
        """While pictures are sampled for validation, the pipeline asks this for prompts that name the concept."""
        rows = self._text.rows_of(encodings)
        if not rows:
            return None
        return self._edit(encodings, torch.tensor(list(rows), device=self.device), self.config.inference_bias, self.config.inference_temperature)

    def sample(self, prompts: list[str], steps: int, seed: int) -> list[Any]:
        """PIL images of prompts with "{}" in them, by the pipeline as a user would call it, the same seed each time."""
        self._editor.forget()
        generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
        texts = [prompt.format(f"<{self.config.name}>") for prompt in prompts]
        return self.pipe(texts, num_inference_steps=steps, generator=generators).images

    def concept(self, recipe: dict[str, Any]) -> Concept:
        """The concept as it is now."""
        config = self.config
        return Concept(
            name=config.name,
            superclass=config.superclass,
            base=self.base,
            value_outputs=self.value_outputs.detach().cpu(),
            target=self.target.cpu(),
            metric_target=self.covariance.metric_targets(self.target[None].cpu())[0].float(),
            superclass_encoding=self.superclass_encoding.cpu(),
            word_embeddings=tuple(word.detach().cpu() for word in self.words),
            key_outputs=None if self.key_outputs is None else self.key_outputs.detach().cpu(),
            bias=config.inference_bias,
            temperature=config.inference_temperature,
            covariance=self.covariance.fingerprint,
            recipe=recipe,
            license=config.license,
            author=config.author,
        )

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, as named tensors."""
        tensors = {"target": self.target, "superclass_encoding": self.superclass_encoding}
        for number, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            tensors[f"parameter.{number}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{number}.{key}"] = value
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from what `state` gave at a step."""
        self.step = step
        self.target = tensors["target"].to(self.device)
        self.superclass_encoding = tensors["superclass_encoding"].to(self.device)
        for number, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            parameter.data.copy_(tensors[f"parameter.{number}"])
            prefix = f"optimizer.{number}."
            kept = {name[len(prefix) :]: value.clone() for name, value in tensors.items() if name.startswith(prefix)}
            # AdamW counts its steps on the CPU
            self.optimizer.state[parameter] = {k: v if k == "step" else v.to(self.device) for k, v in kept.items()}
