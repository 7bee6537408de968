"""`export`: a pipeline to a folder."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perfusion.base import cross_attention_layers, describe_base, text_encoders
from perfusion.base.parts import added_conditioning
from perfusion.exporting import writers
from perfusion.exporting.checks import ExportError, check_exportable
from perfusion.exporting.graphs import ImageDecoderGraph, TextEncoderGraph, UNetGraph
from perfusion.exporting.scheduler import read_schedule
from perfusion.exporting.writers import MAX_ROWS, Graph
from perfusion.families import CUSTOM
from perfusion.files import user_path
from perfusion.runtime import manifest as runtime
from perfusion.runtime.manifest import MANIFEST, WEIGHTS, Manifest, TokenizerFacts, graph_file, tokenizer_file
from perfusion.runtime.tokens import PromptTokenizer

__all__ = ["Exported", "check_replaceable", "export", "unet_graph"]

PROBES = ("a photo of a cat", "two cups, one big; and 12 small ones!", "Grey-blue WAVES at night " * 20)


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written: the folder, its manifest, and of each graph the largest difference from torch, relative to its largest output."""

    folder: Path
    manifest: Manifest
    differences: dict[str, float]


def export(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    format: str = "onnx",
    scheduler: str | None = None,
    compile: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda part: None,
) -> Exported:
    """Write a model as a folder that runs without torch and takes any concept at run time.

    model: a diffusers pipeline of the Stable Diffusion 1.x, 2.x or XL family, not attached, or what `load_pipeline` takes.
    folder: written whole or not at all; overwrite=True replaces an earlier export. format: "onnx" (needs the extra `export`) or
    "pt2" (`torch.export`). scheduler: "ddim", "pndm" or "euler" in place of the pipeline's. compile: with "pt2", AOTInductor
    packages as well, NAME.aoti.pt2: machine code for the pipeline's device. progress: is called with each part's name.

    Numbers have the pipeline's type, float32 or float16; the VAE's may be another. Every graph is run and compared with torch
    before the folder takes its name. ExportError or UnsupportedPipeline says what cannot be exported. The pipeline is left as it was.
    """
    folder = user_path(folder)
    if format not in runtime.FORMATS:
        raise ExportError(f"format must be one of {', '.join(runtime.FORMATS)}, got {format!r}")
    if compile and format != "pt2":
        raise ExportError('compile=True makes AOTInductor packages, beside format="pt2" only')
    check_replaceable(folder, overwrite)
    if format == "onnx":
        writers.require_onnx()
    if isinstance(model, (str, os.PathLike)):
        from perfusion.models import load_pipeline

        model = load_pipeline(model, device="cpu")
    base = describe_base(model)
    check_exportable(model)
    schedule, alphas = read_schedule(model.scheduler, scheduler)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        facts = _write_text_side(model, draft, alphas)
        differences = _write_graphs(model, draft, format, compile, progress)
        multiple, scale = 2**model.unet.num_upsamplers, model.vae_scale_factor
        size = model.unet.config.sample_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        manifest = Manifest(
            format=format,
            base=base,
            dtype=str(model.unet.dtype).removeprefix("torch."),
            schedule=schedule,
            latent_channels=model.unet.config.in_channels,
            latent_scale=scale,
            latent_multiple=multiple,
            height=height * scale,
            width=width * scale,
            max_rows=MAX_ROWS if format == "pt2" else None,
            files={path.name: runtime.digest(path) for path in sorted(draft.iterdir())},
            **facts,
        )
        manifest.write(draft)
        Manifest.read(draft)
        draft.chmod(0o755)
        _replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Exported(folder, manifest, differences)


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """FileExistsError unless the folder is absent or empty, or an earlier export that may be replaced."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise FileExistsError(f"{folder} is there already and is no exported model, so it is not replaced. Choose another folder.")
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} is there already. Choose another folder, or say --overwrite (overwrite=True).")


def _replace(draft: Path, folder: Path) -> None:
    if not folder.exists():
        draft.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    folder.rename(old / folder.name)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# The text side: tokenizers, and the weights that K and V are computed with


def _write_text_side(pipe: Any, folder: Path, alphas: np.ndarray) -> dict[str, Any]:
    from safetensors.numpy import save_file

    layers = cross_attention_layers(pipe.unet).values()
    weights = {f"{kind}_weight": torch.cat([getattr(layer, f"to_{kind[0]}").weight for layer in layers]) for kind in ("key", "value")}
    save_file({**{name: weight.detach().cpu().numpy() for name, weight in weights.items()}, "alphas_cumprod": alphas}, folder / WEIGHTS)

    pairs = text_encoders(pipe)
    lengths = {tokenizer.model_max_length for tokenizer, _ in pairs}
    if len(lengths) > 1 or max(lengths) > 4096:
        raise ExportError(f"its tokenizers must have one model_max_length, of at most 4096, got {lengths}")
    facts = tuple(_write_tokenizer(pipe, tokenizer, folder / tokenizer_file(number)) for number, (tokenizer, _) in enumerate(pairs))
    added = added_conditioning(pipe.unet) == "text_time"
    return {
        "token_length": lengths.pop(),
        "tokenizers": facts,
        "pooled_width": pairs[-1][1].config.projection_dim if added else None,
        "zero_negative": added and bool(getattr(pipe.config, "force_zeros_for_empty_prompt", False)),
    }


def _write_tokenizer(pipe: Any, tokenizer: Any, path: Path) -> TokenizerFacts:
    """The tokenizer's file. ExportError unless the program beside it gives the same ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # transformers 4
        from transformers.convert_slow_tokenizer import convert_slow_tokenizer

        backend = convert_slow_tokenizer(tokenizer)  # without what was added, as the "!" that SDXL fills up with
        for _, token in sorted(tokenizer.added_tokens_decoder.items()):
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    path.write_text(backend.to_str(), encoding="utf-8")
    convert = getattr(pipe, "maybe_convert_prompt", lambda text, _: text)  # textual inversions of several tokens
    words = {word: convert(word, tokenizer) for word in tokenizer.get_added_vocab()}
    facts = TokenizerFacts(
        begin=tokenizer.bos_token_id,
        end=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        expansions={word: text for word, text in words.items() if text != word},
    )
    mine = PromptTokenizer(path, facts, tokenizer.model_max_length)
    for probe in (*PROBES, *(f"a {word} on a hill" for word in facts.expansions)):
        options = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
        if mine.row(probe).tolist() != tokenizer(convert(probe, tokenizer), **options).input_ids:
            kind = type(tokenizer).__name__
            raise ExportError(f"its {kind} reads prompts in a way that tokenizer.json does not say (tried {probe[:40]!r})")
    return facts


# The graphs


def _write_graphs(pipe: Any, folder: Path, format: str, compile: bool, progress: Callable[[str], None]) -> dict[str, float]:
    write = writers.write_onnx if format == "onnx" else writers.write_pt2
    differences = {}
    modules = [part for part in (pipe.unet, pipe.vae, *(encoder for _, encoder in text_encoders(pipe)))]
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        unet = UNetGraph(pipe.unet)
        with unet.installed():
            for graph in (*_text_graphs(pipe), _decoder_graph(pipe), unet_graph(pipe, unet)):
                progress(graph.name)
                program = graph.export()
                differences[graph.name] = write(graph, program, folder / graph_file(graph.name, format))
                if compile:
                    progress(f"{graph.name}, compiled")
                    differences[f"{graph.name}.aoti"] = writers.write_package(graph, program, folder / f"{graph.name}.aoti.pt2")
    finally:
        for module, mode in zip(modules, training):
            module.train(mode)
    return differences


def _numbers(like: torch.nn.Module) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    device = next(like.parameters()).device
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(device, dtype)


def unet_graph(pipe: Any, module: UNetGraph) -> Graph:
    unet, normal = pipe.unet, _numbers(pipe.unet)
    multiple, dtype = 2**unet.num_upsamplers, unet.dtype
    length, outputs = text_encoders(pipe)[0][0].model_max_length, sum(module.widths)
    added = added_conditioning(unet) == "text_time"

    def inputs(rows: int, height: int, width: int) -> dict[str, torch.Tensor]:
        tensors = {
            "sample": normal(rows, unet.config.in_channels, multiple * height, multiple * width, dtype=dtype),
            "timestep": torch.linspace(20, 950, rows, device=unet.device),
            "key": normal(rows, length, outputs, dtype=dtype),
            "value": normal(rows, length, outputs, dtype=dtype),
        }
        if added:
            pooled = text_encoders(pipe)[-1][1].config.projection_dim
            tensors |= {"text_embeds": normal(rows, pooled, dtype=dtype), "time_ids": torch.full((rows, 6), 512.0, device=unet.device)}
        return tensors

    return Graph("unet", module, inputs, ("prediction",), spatial="sample", multiple=multiple)


def _text_graphs(pipe: Any) -> list[Graph]:
    pairs = text_encoders(pipe)
    graphs = []
    for number, (tokenizer, encoder) in enumerate(pairs):
        several = len(pairs) > 1
        pooled = several and number == len(pairs) - 1
        module = TextEncoderGraph(encoder, -2 if several else None, pooled)
        graphs.append(_text_graph(CUSTOM.text_encoders[number], module, tokenizer))
    _compare_with_pipeline(pipe, [graph.module for graph in graphs])
    return graphs


def _text_graph(name: str, module: TextEncoderGraph, tokenizer: Any) -> Graph:
    normal, width = _numbers(module), module.encoder.get_input_embeddings().embedding_dim
    device = next(module.parameters()).device

    def inputs(rows: int, height: int, width_: int) -> dict[str, torch.Tensor]:
        ids = tokenizer(["a photo of a cat, and two dogs"] * rows, padding="max_length", truncation=True, return_tensors="pt").input_ids
        weights = torch.zeros(ids.shape)
        weights[:, 2], weights[:, 4] = 1, 0.5
        return {"input_ids": ids.to(device), "word_embeddings": 0.1 * normal(*ids.shape, width), "word_weights": weights.to(device)}

    return Graph(name, module, inputs, ("encodings", "pooled") if module.pooled else ("encodings",))


def _compare_with_pipeline(pipe: Any, modules: list[TextEncoderGraph]) -> None:
    """ExportError unless the graphs give what the pipeline's own encode_prompt gives."""
    prompt = PROBES[0]
    with torch.no_grad():
        theirs = pipe.encode_prompt(prompt=prompt, device=pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        outputs = []
        for (tokenizer, encoder), module in zip(text_encoders(pipe), modules):
            ids = tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids.to(pipe.unet.device)
            words = torch.zeros(*ids.shape, encoder.get_input_embeddings().embedding_dim, device=ids.device)
            outputs.append(module(ids, words, torch.zeros(ids.shape, device=ids.device)))
    pairs = [(torch.cat([output[0] for output in outputs], -1), theirs[0])]
    if modules[-1].pooled:
        pairs.append((outputs[-1][1], theirs[2]))
    for mine, its in pairs:
        if mine.shape != its.shape or not torch.allclose(mine.float(), its.float(), atol=1e-2, rtol=1e-2):
            raise ExportError(f"{type(pipe).__name__}.encode_prompt reads its text encoders in a way that the export does not know.")


def _decoder_graph(pipe: Any) -> Graph:
    normal, vae = _numbers(pipe.vae), pipe.vae
    if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        raise ExportError("its VAE overflows in float16 (force_upcast). Call pipe.vae.to(torch.float32) first.")
    channels, multiple = pipe.unet.config.out_channels, 2**pipe.unet.num_upsamplers

    def inputs(rows: int, height: int, width: int) -> dict[str, torch.Tensor]:
        return {"latents": normal(rows, channels, multiple * height, multiple * width)}

    return Graph("image_decoder", ImageDecoderGraph(vae), inputs, ("images",), spatial="latents", multiple=multiple)
