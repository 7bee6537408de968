"""As much of ComfyUI as a node meets: token lists, conditionings, ModelPatcher, and its transformer block's calls of patches.

Written after ComfyUI's own sources (comfy/model_patcher.py, comfy/sd1_clip.py, comfy/ldm/modules/attention.py), with the weights of a
diffusers pipeline in it, so that the two can be compared.

    nodes = load_nodes(tmp_path)                     # the pack as ComfyUI loads it, with `folder_paths` and `comfy` to import
    model, clip = ModelPatcher(pipe), CLIP(pipe)
    K, V = model.forward(context)[layer]
"""

import copy
import importlib.util
import re
import sys
import types
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from perfusion.base import cross_attention_layers, text_encoders
from perfusion.original_names import original_name

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
LENGTH = 77


def load_nodes(monkeypatch, models):
    """Import the pack with stand-ins of what it imports of ComfyUI."""
    folder_paths = types.ModuleType("folder_paths")
    folder_paths.models_dir, folder_paths.folder_names_and_paths = str(models), {}
    folder_paths.get_filename_list = lambda name: sorted(
        path.name for folder in folder_paths.folder_names_and_paths[name][0] for path in Path(folder).glob("*")
        if path.suffix in folder_paths.folder_names_and_paths[name][1]
    )  # fmt: skip
    folder_paths.get_full_path = lambda name, file: next(
        (str(Path(folder) / file) for folder in folder_paths.folder_names_and_paths[name][0] if (Path(folder) / file).is_file()), None
    )
    attention = types.ModuleType("comfy.ldm.modules.attention")
    attention.optimized_attention = optimized_attention
    monkeypatch.setitem(sys.modules, "folder_paths", folder_paths)
    for name in ("comfy", "comfy.ldm", "comfy.ldm.modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules.attention", attention)
    return import_pack(monkeypatch)


def import_pack(monkeypatch):
    """Import the pack by its path, under a name that is no identifier, as ComfyUI does."""
    name = str(PACK)
    for old in [each for each in sys.modules if each.startswith(name)]:
        monkeypatch.delitem(sys.modules, old)
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def optimized_attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    seen.append((k, v, mask))
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    mask = mask if mask is None or mask.ndim == 4 else mask.unsqueeze(1) if mask.ndim == 3 else mask[None, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


seen = []  # keys, values and mask of every attention


class ModelPatcher:
    """`model.diffusion_model` has ComfyUI's blocks, of which only cross-attention is there."""

    def __init__(self, pipe):
        self.model = types.SimpleNamespace(diffusion_model=DiffusionModel(pipe))
        self.model_options = {"transformer_options": {}}

    def clone(self):
        other = copy.copy(self)
        other.model_options = copy.deepcopy(self.model_options)
        return other

    def set_model_patch(self, patch, name):
        options = self.model_options["transformer_options"].setdefault("patches", {})
        options[name] = options.get(name, []) + [patch]

    def set_model_attn2_patch(self, patch):
        self.set_model_patch(patch, "attn2_patch")

    def set_model_attn2_replace(self, patch, block_name, number, transformer_index=None):
        block = (block_name, number) if transformer_index is None else (block_name, number, transformer_index)
        options = self.model_options["transformer_options"].copy()
        replaced = options["patches_replace"] = options.get("patches_replace", {}).copy()
        replaced["attn2"] = {**replaced.get("attn2", {}), block: patch}
        self.model_options["transformer_options"] = options

    def forward(self, context, size=(8, 8)):
        """layer -> (K, V, mask) that attention saw, and the output of the last layer."""
        options = {**self.model_options["transformer_options"], "original_shape": [len(context), 4, *size], "cond_or_uncond": [0] * len(context)}
        return self.model.diffusion_model(context, size, options)


class DiffusionModel:
    def __init__(self, pipe):
        self.names, found = {}, {}
        for name, layer in cross_attention_layers(pipe.unet).items():
            original = original_name(name, pipe.unet.config.layers_per_block)
            place, number, index = re.fullmatch(r"(\w+?)_blocks?(?:\.(\d+))?\.1\.transformer_blocks\.(\d+)\.attn2", original).groups()
            found.setdefault((place, int(number or 0)), {})[int(index)] = Block(layer)
            self.names[place, int(number or 0), int(index)] = name
        self.spatial = found

        def blocks(place):
            count = 1 + max((number for each, number in found if each == place), default=-1)
            return [[None, _spatial(found.get((place, number), {}))] for number in range(count)]

        self.input_blocks, self.output_blocks, self.middle_block = blocks("input"), blocks("output"), blocks("middle")[0]

    def __call__(self, context, size, transformer_options):
        layers = {}
        for (place, number), spatial in self.spatial.items():
            transformer_options["block"] = (place, number)
            for index, block in sorted(spatial.items()):
                transformer_options["block_index"] = index
                width = block.attn2.to_q.in_features
                hidden = torch.randn(len(context), size[0] * size[1], width, generator=torch.Generator().manual_seed(number)).to(context)
                seen.clear()
                output = block(hidden, context, transformer_options)
                layers[self.names[place, number, index]] = (*seen[-1], output)
        return layers


def _spatial(blocks):
    return types.SimpleNamespace(transformer_blocks=[blocks[index] for index in sorted(blocks)])


class Block:
    """BasicTransformerBlock, from norm2 to the end of attn2."""

    def __init__(self, layer):
        self.attn2, self.n_heads = layer, layer.heads

    def __call__(self, n, context, transformer_options):
        extra_options, patches, replaces = {}, {}, {}
        for key, value in transformer_options.items():
            if key == "patches":
                patches = value
            elif key == "patches_replace":
                replaces = value
            else:
                extra_options[key] = value
        extra_options |= {"n_heads": self.n_heads, "dim_head": n.shape[-1] // self.n_heads, "attn_precision": None}
        block, index = transformer_options["block"], transformer_options["block_index"]
        context_attn2, value_attn2 = context, None
        if "attn2_patch" in patches:
            value_attn2 = context_attn2
            for p in patches["attn2_patch"]:
                n, context_attn2, value_attn2 = p(n, context_attn2, value_attn2, extra_options)
        replace = replaces.get("attn2", {})
        at = (*block, index) if (*block, index) in replace else block
        value_attn2 = context_attn2 if value_attn2 is None else value_attn2
        q, k, v = self.attn2.to_q(n), self.attn2.to_k(context_attn2), self.attn2.to_v(value_attn2)
        n = replace[at](q, k, v, extra_options) if at in replace else optimized_attention(q, k, v, self.n_heads)
        return self.attn2.to_out[0](n)


class CLIP:
    """Tokens as ComfyUI has them: {"l": [[(id or tensor, weight)] of 77] of chunks}; (text:1.2) weighs, embedding:NAME is looked up."""

    def __init__(self, pipe, embeddings=None):
        self.parts = dict(zip("lg" if len(text_encoders(pipe)) == 2 else "l", text_encoders(pipe)))
        self.hidden = -2 if len(self.parts) == 2 else None
        self.embeddings = embeddings or {}
        self.cond_stage_model = types.SimpleNamespace(
            **{f"clip_{key}": types.SimpleNamespace(transformer=encoder) for key, (_, encoder) in self.parts.items()}
        )

    def tokenize(self, text):
        return {key: self._chunks(text, key, tokenizer) for key, (tokenizer, _) in self.parts.items()}

    def _chunks(self, text, key, tokenizer):
        start, end = tokenizer("").input_ids[:2]
        padding = end if key == "l" else 0
        groups = []
        for part in re.split(r"(\([^()]*:[\d.]+\))", text):
            weighted = re.fullmatch(r"\((.*):([\d.]+)\)", part)
            part, weight = weighted.groups() if weighted else (part, 1.0)
            for piece in re.split(r"(?<=\s)(?=embedding:)", part):
                found = re.match(r"embedding:(\w+)", piece)
                if found and found[1] in self.embeddings:
                    groups.append([(vector, float(weight)) for vector in self.embeddings[found[1]][key]])
                    piece = piece[found.end() :]
                groups.append([(token, float(weight)) for token in tokenizer(piece).input_ids[1:-1]])
        chunks = [[(start, 1.0)]]
        for group in groups:
            large = len(group) >= 8
            while group:
                room = LENGTH - 1 - len(chunks[-1])
                if len(group) <= room:
                    chunks[-1] += group
                    break
                taken = room if large else 0
                chunks[-1] += [*group[:taken], (end, 1.0), *[(padding, 1.0)] * (room - taken)]
                chunks.append([(start, 1.0)])
                group = group[taken:]
        chunks[-1] += [(end, 1.0)]
        chunks[-1] += [(padding, 1.0)] * (LENGTH - len(chunks[-1]))
        return chunks

    @torch.no_grad()
    def encode_from_tokens_scheduled(self, tokens):
        parts = []
        for key, (tokenizer, encoder) in self.parts.items():
            table = encoder.get_input_embeddings()
            outputs = []
            for chunk in (*tokens[key], self._chunks("", key, tokenizer)[0]):
                assert len(chunk) == LENGTH
                ids = torch.tensor([[token if isinstance(token, int) else 0 for token, _ in chunk]])
                vectors = table.weight[ids[0]].clone()
                for place, (token, _) in enumerate(chunk):
                    if not isinstance(token, int):
                        vectors[place] = token
                handle = table.register_forward_hook(lambda module, args, output, vectors=vectors: vectors[None])
                try:
                    result = encoder(ids, output_hidden_states=True)
                finally:
                    handle.remove()
                outputs.append(result[0] if self.hidden is None else result.hidden_states[self.hidden])
            empty = outputs.pop()
            weights = [torch.tensor([weight for _, weight in chunk])[None, :, None] for chunk in tokens[key]]
            parts.append(torch.cat([empty + (each - empty) * weight for each, weight in zip(outputs, weights)], 1))
        return [[torch.cat(parts, -1), {"pooled_output": None}]]
