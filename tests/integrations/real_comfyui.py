"""ComfyUI itself in the place of the stand-in (comfyui.py), with the same names: its ModelPatcher, UNet, CLIP and tokenizer.

    PERFUSION_COMFYUI=~/ComfyUI python -m pytest tests/integrations

runs every test of the node pack against that folder, too. Weights are those of a small diffusers pipeline, by their original names.
"""

import importlib
import os
import re
import sys
from pathlib import Path

import torch

from perfusion.base import cross_attention_layers, text_encoders
from perfusion.original_names import original_name
from tests.integrations import comfyui
from tests.perfusion.original_layout import original_layout

FOLDER = os.environ.get("PERFUSION_COMFYUI")
seen = []  # keys, values and mask of every attention


def load_nodes(monkeypatch, models):
    """Import the pack as ComfyUI does, with its concepts in models/perfusion."""
    _import()
    import folder_paths
    from comfy.ldm.modules import attention

    monkeypatch.setattr(folder_paths, "models_dir", str(models))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    original = attention.optimized_attention

    def watched(q, k, v, heads, *args, mask=None, **kwargs):
        seen.append((k, v, mask))
        return original(q, k, v, heads, *args, mask=mask, **kwargs)

    monkeypatch.setattr(attention, "optimized_attention", watched)
    return comfyui.import_pack(monkeypatch)


def _import():
    if str(Path(FOLDER).expanduser()) not in sys.path:
        sys.path.insert(0, str(Path(FOLDER).expanduser()))
        importlib.import_module("comfy.cli_args").args.cpu = True
    for name in ("comfy.sd", "comfy.model_base", "comfy.model_detection", "comfy.sdxl_clip", "comfy.sample", "folder_paths"):
        importlib.import_module(name)


def optimized_attention(q, k, v, heads, **kwargs):
    from comfy.ldm.modules import attention

    return attention.optimized_attention(q, k, v, heads, **kwargs)


def ModelPatcher(pipe):
    """ComfyUI's model of the pipeline's weights, with `forward` as the stand-in has it."""
    _import()
    import comfy.model_base
    import comfy.model_detection
    import comfy.model_patcher
    import comfy.supported_models

    class Patcher(comfy.model_patcher.ModelPatcher):
        forward = _forward

    xl = len(text_encoders(pipe)) == 2
    tensors = original_layout(pipe, "sdxl" if xl else "sd1", vae=False)
    prefix = "model.diffusion_model."
    found = comfy.model_detection.detect_unet_config(tensors, prefix)
    config = (comfy.supported_models.SDXL if xl else comfy.supported_models.SD15)(found)
    layer = next(iter(cross_attention_layers(pipe.unet).values()))
    config.unet_config |= {"num_heads": -1, "num_head_channels": layer.to_q.out_features // layer.heads} if xl else {"num_heads": layer.heads}
    config.unet_config["dtype"] = torch.float32
    model = config.get_model(tensors, prefix, device="cpu")
    model.diffusion_model.load_state_dict({name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)})
    model.diffusion_model.names = {}
    for name in cross_attention_layers(pipe.unet):
        place, number, index = re.fullmatch(
            r"(\w+?)_blocks?(?:\.(\d+))?\.1\.transformer_blocks\.(\d+)\.attn2", original_name(name, pipe.unet.config.layers_per_block)
        ).groups()
        model.diffusion_model.names[place, int(number or 0), int(index)] = name
    return Patcher(model.eval(), torch.device("cpu"), torch.device("cpu"))


@torch.no_grad()
def _forward(self, context, size=(8, 8)):
    """layer -> (K, V, mask) that attention saw, and its output, in each of ComfyUI's blocks by itself, on random hidden states."""
    options = {**self.model_options["transformer_options"], "original_shape": [len(context), 4, *size], "cond_or_uncond": [0] * len(context)}
    unet, layers = self.model.diffusion_model, {}
    for (place, number, index), name in unet.names.items():
        options |= {"block": (place, number), "block_index": index}
        block = (unet.middle_block if place == "middle" else getattr(unet, f"{place}_blocks")[number])[1].transformer_blocks[index]
        hidden = torch.randn(len(context), size[0] * size[1], block.norm2.weight.numel(), generator=torch.Generator().manual_seed(number))
        hook = block.attn2.to_out.register_forward_hook(lambda *args, name=name: layers.update({name: (*seen[-1], args[2])}))
        block(hidden, context, options)
        hook.remove()
    return layers


def CLIP(pipe):
    """ComfyUI's text encoders and tokenizers with the pipeline's weights."""
    _import()
    import comfy.sd
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.supported_models_base

    encoders = text_encoders(pipe)
    kinds = (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    if len(encoders) == 2:
        kinds = (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
    fields = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "hidden_act")
    options = {f"clip_{key}_model_config": {field: getattr(encoder.config, field) for field in fields} for key, (_, encoder) in zip("lg", encoders)}
    clip = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(*kinds), model_options={**options, "dtype": torch.float32})
    for key, (_, encoder) in zip("lg", encoders):
        weights = {name if name.startswith("text_") else f"text_model.{name}": value for name, value in encoder.state_dict().items()}
        weights.pop("text_projection.weight", None)  # of the pooled output, narrow here; ComfyUI's is square
        missing, unknown = getattr(clip.cond_stage_model, f"clip_{key}").load_sd(weights)
        assert not [name for name in (*missing, *unknown) if name not in ("text_projection.weight", "text_model.embeddings.position_ids")]
    clip.parts = dict(zip("lg", encoders))
    return clip
