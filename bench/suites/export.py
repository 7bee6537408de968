"""One UNet step of an exported model in onnxruntime, against the same step in eager torch, on a CPU.

Providers, two rows with their own text each:

    torch                   the pipeline's UNet, which projects the encodings in every layer at every step
    torch, K and V          the exported module in eager torch: K and V of all layers are inputs
    onnxruntime             `perfusion export`, one K and one V input for all layers
    onnxruntime, by layer   the same graph with an input pair per layer

Models: toybox, and the upper two levels of Stable Diffusion 1.5's UNet at its widths with random weights, at latents of 16 x 16;
with --quick, the tests' tiny pipeline. The gate: the prediction, against the UNet's in float64. Writing a graph takes up to a minute.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import Options, Problem
from bench.timing import Candidate
from perfusion.base import describe_base
from perfusion.exporting import writers
from perfusion.exporting.folder import unet_graph
from perfusion.exporting.graphs import UNetGraph
from perfusion.exporting.writers import Graph
from perfusion.models import load_pipeline
from tests.perfusion.tiny import tiny_sd

ROWS = 2
SD15 = dict(
    block_out_channels=(320, 640), layers_per_block=2, norm_num_groups=32, attention_head_dim=8, sample_size=16,
    down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
)  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {"toybox": lambda: load_pipeline("toybox"), "sd15": lambda: tiny_sd(width=768, unet=SD15)}


class ByLayer(torch.nn.Module):
    """The graph with K and V of each layer as inputs of their own: kv is key, value of the first layer, of the second, ..."""

    def __init__(self, joined: UNetGraph):
        super().__init__()
        self.joined = joined

    def forward(self, sample: Tensor, timestep: Tensor, kv: list[Tensor]) -> Tensor:
        return self.joined.predict(sample, timestep, list(zip(kv[::2], kv[1::2])))


def problems(options: Options) -> Iterator[Problem]:
    models = {"tiny": tiny_sd} if options.quick else {name: make for name, make in MODELS.items() if name in options.models}
    for name, make in models.items():
        with tempfile.TemporaryDirectory() as folder:
            yield problem(name, make().to(options.device), Path(folder), options)


def problem(name: str, pipe: Any, folder: Path, options: Options) -> Problem:
    unet = pipe.unet.requires_grad_(False).eval()
    base, side = describe_base(pipe), unet.config.sample_size
    module = UNetGraph(copy.deepcopy(unet, {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}))
    generator = torch.Generator().manual_seed(0)
    length = pipe.tokenizer.model_max_length
    sample = torch.randn(ROWS, unet.config.in_channels, side, side, generator=generator).to(options.device)
    encodings = torch.randn(ROWS, length, base.encoding_dim, generator=generator).to(options.device)
    timestep = torch.full((ROWS,), 500.0, device=options.device)
    pairs = [(layer.to_k(encodings), layer.to_v(encodings)) for layer in module.layers.values()]
    key, value = (torch.cat(each, -1) for each in zip(*pairs))
    inputs = {"sample": sample, "timestep": timestep, "key": key, "value": value}
    by_layer = {"sample": sample, "timestep": timestep}
    by_layer |= {f"{kind}_{number}": each for number, pair in enumerate(pairs) for kind, each in zip(("key", "value"), pair)}

    def stock(unet: torch.nn.Module = unet, dtype: torch.dtype = torch.float32) -> Tensor:
        with torch.no_grad():
            return unet(sample.to(dtype), timestep, encodings.to(dtype), return_dict=False)[0]

    def exact() -> Tensor:
        return stock(copy.deepcopy(unet).double(), torch.float64)

    def eager() -> Tensor:
        with torch.no_grad():
            return module(**inputs)

    candidates = [Candidate("torch", stock), Candidate("torch, K and V", eager)]
    with module.installed():
        graph = unet_graph(pipe, module)
        written = {"onnxruntime": (graph, inputs), "onnxruntime, by layer": (split_graph(graph, module, pairs), by_layer)}
        for provider, (each, arrays) in written.items():
            candidates.append(Candidate(provider, *onnx(each, arrays, folder / f"{len(candidates)}.onnx", options)))
    module.install()  # for the candidate that calls it; it has processors of its own
    shapes = dict(R=ROWS, T=length, D=base.encoding_dim, O=base.outputs, layers=len(base.layers), side=side)
    index = torch.zeros(ROWS, 1, dtype=torch.int32, device=options.device)
    return Problem(f"{name}, {side} x {side}", shapes, torch.float32, index, exact, stock, candidates)


def split_graph(graph: Graph, module: UNetGraph, pairs: list[tuple[Tensor, Tensor]]) -> Graph:
    def inputs(rows: int, height: int, width: int) -> dict[str, Any]:
        whole = graph.inputs(rows, height, width)
        parts = zip(whole["key"].split(module.widths, -1), whole["value"].split(module.widths, -1))
        return {"sample": whole["sample"], "timestep": whole["timestep"], "kv": [each for pair in parts for each in pair]}

    return Graph("unet", ByLayer(module), inputs, graph.outputs, graph.spatial, graph.multiple)


def onnx(graph: Graph, arrays: dict[str, Tensor], path: Path, options: Options) -> tuple[Callable[[], Tensor] | None, str]:
    """What runs the graph, or why nothing can."""
    if options.device.type != "cpu":
        return None, "onnxruntime is measured on a CPU"
    try:
        import onnxruntime
    except ImportError as error:
        return None, f"{error}: pip install 'perfusion-kernels[export]'"
    writers.save_onnx(graph, graph.export(), path, list(arrays))
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    feed = {name: array.detach().numpy() for name, array in arrays.items()}
    return lambda: torch.from_numpy(session.run(None, feed)[0]), ""
