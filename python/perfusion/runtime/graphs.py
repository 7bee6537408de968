"""Graphs as functions: arrays by name in, arrays in order out. Here by onnxruntime; any other runtime is another function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perfusion.runtime.manifest import ExportedFolderError, Manifest, graph_file

__all__ = ["Graph", "load_graphs"]

Graph = Callable[..., Sequence[np.ndarray]]


def load_graphs(
    folder: Path, manifest: Manifest, names: Sequence[str], *, providers: Sequence[Any] | None = None, threads: int | None = None
) -> dict[str, Graph]:
    """Graphs of an ONNX export, by their names, in onnxruntime.

    providers: as onnxruntime takes them, by default all that this installation has, in its own order. threads: for one operator,
    by default onnxruntime's choice.
    ExportedFolderError when onnxruntime is missing or a graph is not what the manifest says.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportedFolderError(f"{folder} needs onnxruntime ({error}). Install it: pip install 'perfusion-kernels[export]'") from None
    if manifest.format != "onnx":
        raise ExportedFolderError(
            f"{folder} holds torch.export programs ({manifest.format}), which are never loaded from here. Export with --format onnx, "
            "or give functions for its graphs: Runtime(folder, graphs={...})."
        )
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    graphs = {}
    for name in names:
        path = folder / graph_file(name, "onnx")
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=providers or onnxruntime.get_available_providers())
        except Exception as error:  # onnxruntime's errors have no common base of their own
            raise ExportedFolderError(f"{path}: onnxruntime cannot load it ({error}). Export the model again.") from None
        _check(path, name, manifest, session)
        graphs[name] = _function(session)
    return graphs


NUMBERS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def _function(session: Any) -> Graph:
    types = {value.name: NUMBERS[value.type] for value in session.get_inputs()}

    def run(**arrays: np.ndarray) -> Sequence[np.ndarray]:
        return session.run(None, {name: np.ascontiguousarray(array, types[name]) for name, array in arrays.items()})

    return run


def _expected(name: str, manifest: Manifest) -> dict[str, list[int | None]]:
    """The inputs of a graph; None where a size is free."""
    length, outputs, channels = manifest.token_length, manifest.base.outputs, manifest.latent_channels
    if name == "unet":
        shapes = {"sample": [None, channels, None, None], "timestep": [None]}
        shapes |= {"key": [None, length, outputs], "value": [None, length, outputs]}
        added = {} if manifest.pooled_width is None else {"text_embeds": [None, manifest.pooled_width], "time_ids": [None, 6]}
        return {**shapes, **added}
    if name == "image_decoder":
        return {"latents": [None, channels, None, None]}
    width = manifest.base.text_widths[manifest.text_graphs.index(name)]
    return {"input_ids": [None, length], "word_embeddings": [None, length, width], "word_weights": [None, length]}


def _check(path: Path, name: str, manifest: Manifest, session: Any) -> None:
    def free(size: Any) -> Any:
        return size if isinstance(size, int) else None

    inputs = {value.name: list(map(free, value.shape)) for value in session.get_inputs()}
    expected = _expected(name, manifest)
    if inputs != expected or any(value.type not in NUMBERS for value in session.get_inputs()):
        raise ExportedFolderError(
            f"{path} must take {expected}, by the manifest beside it, and takes {inputs}: it belongs to another model. "
            "Export the model again."
        )
