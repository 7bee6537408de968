"""Peers of a UNet's step: other ways to have a concept in it, each by its own library where there is one.

    expert              about twenty lines of plain torch: keys and values computed once per prompt, a processor that reads them
    gated edit          Perfusion's layer as the paper writes it: every to_k and to_v a module that computes eq. 3 at every step
    perfusion-pytorch   the same by that library's `Rank1EditModule`
    LoRA                peft's, of rank 4 in to_q, to_k, to_v and to_out of all attention: unfused, fused, and its mixed batch

Each function changes a UNet that is not shared, and returns what to call in its place, or the UNet itself.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from perfusion.base import cross_attention_layers
from perfusion.concept import Concept
from tests.perfusion.editing import inverse_covariance

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RANK = 4


def eq3(e: Tensor, concept: Concept, weight: Tensor, output: Tensor) -> Tensor:
    """h [R, T, d] = W (e - c i*) + g o* of encodings [R, T, D] (arXiv 2305.01644, eq. 3); c and g in float32, C⁻¹ needs it."""
    similarity = (e.float() @ concept.metric_target) / concept.energy
    gate = torch.sigmoid((similarity - concept.bias) / concept.temperature).to(e.dtype)
    return linear((e - similarity[..., None] * concept.target).to(e.dtype), weight) + gate[..., None] * output


class GatedEdit(torch.nn.Module):
    """In place of a `to_k` or `to_v`; edits the rows of the second half of a batch, where guidance has the prompt."""

    def __init__(self, module: torch.nn.Linear, concept: Concept, output: Tensor):
        super().__init__()
        self.weight, self.concept, self.output = module.weight, concept, output

    def forward(self, e: Tensor) -> Tensor:
        plain, edited = e.chunk(2)
        return torch.cat([linear(plain, self.weight), eq3(edited, self.concept, self.weight, self.output)])


def outputs_of(layer: Any, name: str, concept: Concept) -> dict[str, Tensor]:
    """o* of a layer's keys, which are the superclass's, and of its values."""
    weight = layer.to_k.weight
    return {"to_k": linear(concept.superclass_encoding.to(weight), weight), "to_v": concept.value_output(name).to(weight)}


def with_gated_edit(unet: Any, concept: Concept) -> Any:
    for name, layer in cross_attention_layers(unet).items():
        for kind, output in outputs_of(layer, name, concept).items():
            setattr(layer, kind, GatedEdit(getattr(layer, kind), concept, output))
    return unet


class ExpertProcessor:
    """Attention to keys and values [R, H, T, d] that were computed before."""

    def __init__(self, key: Tensor, value: Tensor):
        self.key, self.value = key, value

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        attended = scaled_dot_product_attention(query, self.key, self.value)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))


@torch.no_grad()
def with_expert(unet: Any, concept: Concept, encodings: Tensor) -> Any:
    """For one prompt: `encodings` [R, T, D], edited in the second half of the rows."""
    for name, layer in cross_attention_layers(unet).items():
        heads = {}
        for kind, output in outputs_of(layer, name, concept).items():
            both = GatedEdit(getattr(layer, kind), concept, output)(encodings)
            heads[kind] = both.unflatten(-1, (layer.heads, -1)).transpose(1, 2).contiguous()
        layer.processor = ExpertProcessor(heads["to_k"], heads["to_v"])
    return unet


def rank1_edit_module() -> type:
    """perfusion-pytorch's layer; raises ImportError with the reason where it cannot be imported.

    Its package imports open_clip for a text encoder that is not used here, and with it torchvision; where only that is missing,
    an empty class replaces the text encoder, and the layer is the library's own.
    """
    loaded = sys.modules.get("perfusion_pytorch.perfusion")
    if loaded is not None and hasattr(loaded, "Rank1EditModule"):
        return loaded.Rank1EditModule
    try:
        from perfusion_pytorch import Rank1EditModule

        return Rank1EditModule
    except ImportError as error:
        found, reason = importlib.util.find_spec("perfusion_pytorch"), error
    if found is None:
        raise ImportError("perfusion-pytorch is not installed: pip install perfusion-pytorch")
    # its package's __init__ imports open_clip; the layer's own file does not need more of it than the name of a class
    for name in [name for name in sys.modules if name.split(".")[0] == "perfusion_pytorch"]:
        del sys.modules[name]
    package, adapter = types.ModuleType("perfusion_pytorch"), types.ModuleType("perfusion_pytorch.open_clip")
    package.__path__, adapter.OpenClipAdapter = list(found.submodule_search_locations), type("OpenClipAdapter", (), {})
    sys.modules |= {package.__name__: package, adapter.__name__: adapter}
    try:
        return importlib.import_module("perfusion_pytorch.perfusion").Rank1EditModule
    except ImportError as second:
        raise ImportError(f"perfusion-pytorch cannot be imported: {reason}; its layer alone neither: {second}") from None


@torch.no_grad()
def with_perfusion_pytorch(unet: Any, concept: Concept, tokens: int) -> Any:
    """Its layers take one set of concepts for a whole batch: rows of no words are edited, too. tokens: T."""
    kind_of = rank1_edit_module()
    width = len(concept.target)
    covariance = torch.linalg.inv(inverse_covariance(width)).float()
    for name, layer in cross_attention_layers(unet).items():
        for kind, output in outputs_of(layer, name, concept).items():
            made = kind_of(
                getattr(layer, kind), num_concepts=1, C=covariance, is_key_proj=kind == "to_k", eval_beta=concept.bias,
                eval_temperature=concept.temperature, text_seq_len=tokens,
            )  # fmt: skip
            made.initted[:] = True
            made.ema_concept_text_encs.copy_(concept.target[None])
            made.concept_outputs.data.copy_(output[None])
            setattr(layer, kind, made.eval().requires_grad_(False))
    return unet


def lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False)


def save_lora(pipe: Any, folder: Path, *, seed: int = 0) -> None:
    """Weights of a LoRA for the pipeline's UNet, by diffusers' own writer."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    unet = copy.deepcopy(pipe.unet, {id(each): each for each in pipe.unet.parameters()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(lora_config(), adapter_name="subject")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, adapter_name="subject"))
    type(pipe).save_lora_weights(folder, unet_lora_layers=layers)


def with_lora(unet: Any, *, fused: bool = False) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same weights, fused or not
        unet.add_adapter(lora_config(), adapter_name="subject")
    unet.eval().requires_grad_(False)
    if fused:
        unet.fuse_lora()
    return unet


def with_mixed_lora(unet: Any, names: list[str]) -> Any:
    """peft's model around the UNet, with an adapter for each name; a forward says by `adapter_names` which row has which."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the first adapter is the same however many there are
        model = get_peft_model(unet, lora_config(), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, lora_config())
    return model.eval().requires_grad_(False)


