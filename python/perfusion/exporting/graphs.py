"""The three graphs of an export, as torch modules over a pipeline's own weights. Nothing is copied.

    UNetGraph           latents, timesteps, K and V of all cross-attention layers  ->  the model's prediction
    TextEncoderGraph    token ids, words to put in their places                    ->  encodings
    ImageDecoderGraph   latents                                                    ->  pictures

K and V are computed outside, by products with the weights of `to_k` and `to_v`, which no graph holds. So the edit of a concept
(DESIGN.md, H1 and H2) is over before a graph begins, and every row of a batch may have another one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from perfusion.base import cross_attention_layers, layer_width

__all__ = ["ImageDecoderGraph", "TextEncoderGraph", "UNetGraph"]


class _FromKeysAndValues:
    """An attention processor: `to_q` and `to_out` of the layer, and between them attention over a given key and value [R, T, d]."""

    key: Tensor
    value: Tensor

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        inputs = attn.to_q(hidden_states), self.key, self.value
        query, key, value = (each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in inputs)
        output = scaled_dot_product_attention(query, key, value, scale=attn.scale).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](output))


class UNetGraph(nn.Module):
    """sample [R, C, h, w], timestep [R], key and value [R, T, O] (text_embeds [R, P], time_ids [R, 6]) -> prediction [R, C, h, w].

    O: the outputs of all cross-attention layers side by side, in the order of `cross_attention_layers`, as in a concept's
    `value_outputs`. Use it inside `installed()`.
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet
        self.layers = cross_attention_layers(unet)
        self.widths = [layer_width(layer) for layer in self.layers.values()]
        self._processors = [_FromKeysAndValues() for _ in self.layers]

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Inside the `with`, cross-attention reads the graph's inputs and self-attention is torch's own; afterwards all is as before."""
        attentions = self._attentions()
        before = [module.processor for module in attentions]
        try:
            self.install()
            yield
        finally:
            for module, processor in zip(attentions, before):
                module.processor = processor

    def install(self) -> None:
        """For good, in a UNet that nobody else uses."""
        from diffusers.models.attention_processor import AttnProcessor2_0

        for module in self._attentions():
            module.processor = AttnProcessor2_0()
        for layer, processor in zip(self.layers.values(), self._processors):
            layer.processor = processor

    def _attentions(self) -> list[nn.Module]:
        return [module for module in self.unet.modules() if hasattr(module, "processor") and hasattr(module, "to_q")]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        key: Tensor,
        value: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        # in float32, as the UNet has its embedding of the sizes: ONNX joins numbers of one type only
        added = None if text_embeds is None else {"text_embeds": text_embeds.float(), "time_ids": time_ids.float()}
        return self.predict(sample, timestep, list(zip(key.split(self.widths, -1), value.split(self.widths, -1))), added)

    def predict(
        self, sample: Tensor, timestep: Tensor, pairs: list[tuple[Tensor, Tensor]], added: dict[str, Tensor] | None = None
    ) -> Tensor:
        """From the key and value [R, T, d] of each layer."""
        for processor, (key, value) in zip(self._processors, pairs):
            processor.key, processor.value = key, value
        # the layers are told to attend to something other than the image, and read nothing of it
        return self.unet(sample, timestep, encoder_hidden_states=pairs[0][0], added_cond_kwargs=added, return_dict=False)[0]


class TextEncoderGraph(nn.Module):
    """input_ids [R, T] int64, word_embeddings [R, T, width], word_weights [R, T] -> encodings [R, T, width] (, pooled [R, P]).

    A position's token embedding is interpolated towards its word embedding: weight 0 reads the token and weight 1 the word, each
    to the bit. hidden_layer: which of the encoder's hidden states is the encoding, None for its last one behind the final norm.
    """

    def __init__(self, encoder: nn.Module, hidden_layer: int | None, pooled: bool):
        super().__init__()
        self.encoder, self.hidden_layer, self.pooled = encoder, hidden_layer, pooled

    def forward(self, input_ids: Tensor, word_embeddings: Tensor, word_weights: Tensor) -> tuple[Tensor, ...]:
        def substitute(module: nn.Module, args: tuple[Any, ...], tokens: Tensor) -> Tensor:
            weights = word_weights.to(tokens)[..., None]
            words = word_embeddings.to(tokens)
            return torch.where(weights == 1, words, tokens + weights * (words - tokens))

        handle = self.encoder.get_input_embeddings().register_forward_hook(substitute)
        try:
            output = self.encoder(input_ids, output_hidden_states=self.hidden_layer is not None)
        finally:
            handle.remove()
        encodings = output[0] if self.hidden_layer is None else output.hidden_states[self.hidden_layer]
        return (encodings, output[0]) if self.pooled else (encodings,)


class ImageDecoderGraph(nn.Module):
    """latents [R, C, h, w] as the UNet has them -> images [R, 3, H, W] from 0 to 1."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae
        mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))  # of some SDXL models
        normed = mean is not None and deviation is not None
        channels = (1, -1, 1, 1)
        self.register_buffer("scale", torch.tensor(deviation if normed else [1.0]).view(channels) / vae.config.scaling_factor)
        self.register_buffer("mean", torch.tensor(mean if normed else [0.0]).view(channels))

    def forward(self, latents: Tensor) -> Tensor:
        images = self.vae.decode((latents * self.scale + self.mean).to(self.vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)
