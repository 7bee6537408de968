"""A graph to a file: `torch.export`, and from there ONNX or an AOTInductor package.

What was written is run, by onnxruntime or as the loaded program, and compared with the module it came from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perfusion.exporting.checks import ExportError

__all__ = ["MAX_ROWS", "Graph", "require_onnx", "save_onnx", "write_onnx", "write_package", "write_pt2"]

MAX_ROWS = 63  # diffusers' upsampling takes another branch from 64 rows on, and torch.export follows one
OPSET = 18
SINGLE_FILE_BYTES = 2**30  # a protobuf ends at 2 GiB; larger weights stand in a file beside it
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2}  # of the largest output; a wrong graph is off by its own size


@dataclasses.dataclass
class Graph:
    """A module with its inputs and outputs by name.

    inputs: (rows, height, width) -> example tensors by name, height and width in units of `multiple`. spatial: the input whose
    last dimensions are the latents' height and width, which `multiple` divides; None where there is none.
    """

    name: str
    module: nn.Module
    inputs: Callable[[int, int, int], dict[str, Tensor]]
    outputs: tuple[str, ...]
    spatial: str | None = None
    multiple: int = 1

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def export(self) -> torch.export.ExportedProgram:
        """With a free number of rows, height and width. ExportError with torch's reason."""
        rows = torch.export.Dim("rows", min=1, max=MAX_ROWS)
        height, width = (torch.export.Dim(name, min=1, max=256) for name in ("height", "width"))
        examples = self.inputs(2, 2, 3)
        shapes = {name: [{0: rows}] * len(each) if isinstance(each, list) else {0: rows} for name, each in examples.items()}
        if self.spatial:
            shapes[self.spatial] |= {2: self.multiple * height, 3: self.multiple * width}
        try:
            with torch.no_grad():
                return torch.export.export(self.module, (), examples, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # of many kinds
            raise ExportError(f"torch.export cannot follow the {self.name}: {error}") from error

    def compare(self, run: Callable[[Mapping[str, Tensor]], Any]) -> float:
        """Largest difference of a written graph from the module, relative to the largest output. ExportError when it is another one."""
        worst = 0.0
        for rows, height, width in ((1, 2, 2), (3, 3, 2)):
            inputs = self.inputs(rows, height, width)
            with torch.no_grad():
                expected = self.module(**inputs)
            expected = expected if isinstance(expected, tuple) else (expected,)
            for name, mine, theirs in zip(self.outputs, expected, run(inputs), strict=True):
                theirs = torch.as_tensor(theirs).to(mine)
                difference = float("inf") if theirs.shape != mine.shape else (theirs - mine).abs().max() / mine.abs().max().clamp(min=1e-6)
                worst = max(worst, float(difference))
                if not difference <= TOLERANCE[self.dtype]:
                    raise ExportError(
                        f"the exported {self.name} differs from the model by {float(difference):.2g} of its largest {name}, "
                        f"more than {TOLERANCE[self.dtype]:g}. Nothing was kept."
                    )
        return worst


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's remarks, on which nobody here can act."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def write_pt2(graph: Graph, program: torch.export.ExportedProgram, path: Path) -> float:
    torch.export.save(program, path)
    with torch.no_grad():
        return graph.compare(lambda inputs: _tuple(program.module()(**inputs)))


def write_package(graph: Graph, program: torch.export.ExportedProgram, path: Path) -> float:
    """Machine code for this processor or GPU, by AOTInductor. ExportError without a working compiler."""
    try:
        with _quietly():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
            compiled = torch._inductor.aoti_load_package(str(path))
    except Exception as error:  # of many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"AOTInductor cannot compile the {graph.name}: {reason[0]}. It needs a C++ compiler such as g++.") from error
    with torch.no_grad():
        return graph.compare(lambda inputs: _tuple(compiled(**inputs)))


def write_onnx(graph: Graph, program: torch.export.ExportedProgram, path: Path) -> float:
    """ExportError when a package of the extra `export` is missing, or the graph has an operator that ONNX has not."""
    onnxruntime = require_onnx()
    save_onnx(graph, program, path, list(graph.inputs(1, 1, 1)))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return graph.compare(lambda inputs: session.run(None, {name: tensor.cpu().numpy() for name, tensor in inputs.items()}))


def save_onnx(graph: Graph, program: torch.export.ExportedProgram, path: Path, names: list[str]) -> None:
    """The ONNX file alone. names: of the inputs."""
    try:
        with _quietly():
            written = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=names, output_names=list(graph.outputs), verbose=False
            )
    except Exception as error:  # of many kinds
        raise ExportError(f"the {graph.name} cannot be written as ONNX: {error}") from error
    _name_axes(written, graph)
    size = sum(parameter.nbytes for parameter in graph.module.parameters())
    written.save(str(path), external_data=size > SINGLE_FILE_BYTES)


def require_onnx() -> Any:
    """onnxruntime. ExportError names the package that is missing of those that ONNX files need."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"ONNX needs the package {error.name}. Install it: pip install 'perfusion-kernels[export]'") from None
    return onnxruntime


def _name_axes(written: Any, graph: Graph) -> None:
    """rows, height and width in place of torch's s0, 2*s1 and 2*s2, for who reads the graph's inputs."""
    inputs = {value.name: value for value in written.model.graph.inputs}
    first = inputs[graph.spatial or next(iter(inputs))]
    axes = {0: "rows"} | ({2: "height", 3: "width"} if graph.spatial else {})
    mapping = {str(first.shape[axis].value): name for axis, name in axes.items() if not isinstance(first.shape[axis], int)}
    if hasattr(written, "rename_axes"):  # torch 2.11
        written.rename_axes(mapping)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
