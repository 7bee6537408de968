"""Checkpoints as model sites distribute them: one file, layers under the names of the original implementations.

    config = small("sdxl")                                  # the shipped configuration, narrow
    tensors = original_layout(pipeline_of(config), "sdxl")  # "model.diffusion_model.input_blocks.0.0.weight", ...

The names are written down here from the original code (CompVis and Stability), not by diffusers' converter, which is what reads them.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import tempfile
from pathlib import Path

import diffusers
import torch
import transformers
from torch import Tensor

from perfusion import checkpoint_file
from perfusion.checkpoint_file import Kind, configuration, write_configuration
from perfusion.families import FAMILIES

WIDTHS = {"sd1": 24, "sd2": 40, "sdxl": 56}  # SDXL: 24 + 32
REAL = configuration


def small(family: str) -> dict:
    """The family's structure at small widths: every block, two layers of text, the real vocabulary."""
    config = copy.deepcopy(REAL(family))
    blocks = len(config["unet"]["block_out_channels"])
    heads = config["unet"]["attention_head_dim"]
    config["unet"] |= {"block_out_channels": [32, 64, 64, 64][:blocks], "sample_size": 8, "cross_attention_dim": WIDTHS[family]}
    config["unet"]["attention_head_dim"] = 4 if isinstance(heads, int) else [2, 4, 4, 4][:blocks]
    if family == "sdxl":
        config["unet"] |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 16}
        config["unet"]["transformer_layers_per_block"] = [1, 1, 2]
    config["vae"] |= {"block_out_channels": [32, 32, 32, 32], "sample_size": 64}
    for name, width, projection in (("text_encoder", WIDTHS[family] if family != "sdxl" else 24, 24), ("text_encoder_2", 32, 16)):
        if name in config:
            config[name] |= {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "num_hidden_layers": 3}
            config[name]["projection_dim"] = projection
    return config


def use_small_families(monkeypatch) -> None:
    """Let the loader take the small configurations for the real ones."""
    monkeypatch.setattr(checkpoint_file, "configuration", small)
    for id in WIDTHS:
        monkeypatch.setitem(FAMILIES, id, dataclasses.replace(FAMILIES[id], encoding_dim=WIDTHS[id]))


def pipeline_of(kind: Kind, seed: int = 0, device: str = "cpu"):
    """A pipeline with random weights in the configuration that `checkpoint_file.configuration` now gives."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        write_configuration(Path(folder), kind)
        parts = {}
        for name, (library, class_name) in _parts(folder):
            cls = getattr(diffusers if library == "diffusers" else transformers, class_name)
            if name.startswith("text_encoder"):
                with torch.device(device):
                    parts[name] = cls(cls.config_class.from_pretrained(f"{folder}/{name}"))
            elif name in ("unet", "vae"):
                with torch.device(device):
                    parts[name] = cls.from_config(cls.load_config(folder, subfolder=name))
            else:
                parts[name] = cls.from_pretrained(folder, subfolder=name)
        optional = {} if kind.family == "sdxl" else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = getattr(diffusers, kind.pipeline)(**parts, **optional)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is not None:
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _parts(folder: str) -> list:
    index = json.loads((Path(folder) / "model_index.json").read_text())
    return [(name, value) for name, value in index.items() if isinstance(value, list) and value[0] is not None]


def original_layout(pipe, family: str, *, vae: bool = True) -> dict[str, Tensor]:
    """Every weight of a pipeline under its original name."""
    tensors = {f"model.diffusion_model.{unet_name(name)}": value for name, value in pipe.unet.state_dict().items()}
    if vae:
        tensors |= {f"first_stage_model.{vae_name(name)}": _convolution(name, value) for name, value in pipe.vae.state_dict().items()}
    if family == "sd1":
        tensors |= _clip(pipe.text_encoder, "cond_stage_model.transformer.")
    elif family == "sd2":
        tensors |= _open_clip(pipe.text_encoder, "cond_stage_model.model.")
    else:
        tensors |= _clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= _open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    return {name: value.contiguous().clone() for name, value in _place_upsamplers(tensors).items()}


_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
           "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip


def unet_name(name: str) -> str:
    for new, old in {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    }.items():  # fmt: skip
        if name.startswith(new + "."):
            return old + name[len(new) :]
    head, _, rest = name.partition("_block")
    if head == "mid":
        kind, number, rest = re.fullmatch(r"\.(resnets|attentions)\.(\d)\.(.*)", rest).groups()
        place = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{place}.{_inner(kind, rest)}"
    block, kind, number, rest = re.fullmatch(r"s\.(\d)\.(\w+)\.(\d)\.(.*)", rest).groups()
    block, number = int(block), int(number)
    if head == "down":
        if kind == "downsamplers":
            return f"input_blocks.{3 * block + 3}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{3 * block + number + 1}.{int(kind == 'attentions')}.{_inner(kind, rest)}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * block + 2}.UP.{rest}"
    return f"output_blocks.{3 * block + number}.{int(kind == 'attentions')}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    if kind != "resnets":
        return rest
    part, _, end = rest.partition(".")
    return f"{_RESNET[part]}.{end}"


def _place_upsamplers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The upsampler stands behind the attention where its block has one."""
    placed = {}
    for name, value in tensors.items():
        if ".UP." in name:
            block = name.split(".UP.")[0]
            attention = any(other.startswith(f"{block}.1.") and ".UP." not in other for other in tensors)
            name = name.replace(".UP.", ".2." if attention else ".1.")
        placed[name] = value
    return placed


def vae_name(name: str) -> str:
    name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", name)
    name = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
    name = re.sub(r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"decoder.up.{3 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{3 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name).replace("mid_block.attentions.0", "mid.attn_1")
    for new, old in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(f"attn_1.{new}.", f"attn_1.{old}.")
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def _convolution(name: str, value: Tensor) -> Tensor:
    """Attention in the original VAE is of 1 x 1 convolutions."""
    return value[..., None, None] if re.search(r"attentions\.0\.to_\w+(\.0)?\.weight", name) else value


def _clip(model, prefix: str) -> dict[str, Tensor]:
    return {
        prefix + (name if name.startswith("text_model.") else f"text_model.{name}"): value
        for name, value in model.state_dict().items()
        if "position_ids" not in name
    } | {f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


def _open_clip(model, prefix: str) -> dict[str, Tensor]:
    weights = {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    tensors = {
        "token_embedding.weight": weights["embeddings.token_embedding.weight"],
        "positional_embedding": weights["embeddings.position_embedding.weight"],
        "logit_scale": torch.tensor(4.6),
    }
    width = tensors["positional_embedding"].shape[1]
    tensors["text_projection"] = weights["text_projection.weight"].T if "text_projection.weight" in weights else torch.zeros(width, width)
    for kind in ("weight", "bias"):
        tensors[f"ln_final.{kind}"] = weights[f"final_layer_norm.{kind}"]
        for number in range(model.config.num_hidden_layers):
            old, new = f"encoder.layers.{number}", f"transformer.resblocks.{number}"
            joined = torch.cat([weights[f"{old}.self_attn.{each}_proj.{kind}"] for each in "qkv"])
            tensors[f"{new}.attn.in_proj_{kind}"] = joined
            for theirs, ours in {
                "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
            }.items():  # fmt: skip
                tensors[f"{new}.{ours}.{kind}"] = weights[f"{old}.{theirs}.{kind}"]
    return {prefix + name: value for name, value in tensors.items()}
