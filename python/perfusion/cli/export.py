"""`perfusion export`: a model as a folder that runs without torch."""

from __future__ import annotations

import enum
import shlex
from pathlib import Path
from typing import Annotated, Optional

import typer

from perfusion.cli.models import Precision


class Format(str, enum.Enum):
    onnx = "onnx"
    pt2 = "pt2"


class Scheduler(str, enum.Enum):
    ddim = "ddim"
    pndm = "pndm"
    euler = "euler"


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="toybox, or a checkpoint in diffusers' folder format.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder to write.", show_default=False)],
    format: Annotated[Format, typer.Option(help="onnx, or pt2 for torch.export programs.")] = Format.onnx,
    scheduler: Annotated[Optional[Scheduler], typer.Option(help="Sample with this one. By default the model's own.")] = None,
    dtype: Annotated[Precision, typer.Option(help="Number format of the graphs: float32 or float16.")] = Precision.float32,
    compile: Annotated[bool, typer.Option("--compile", help="With pt2: AOTInductor packages for this machine as well.")] = False,
    device: Annotated[Optional[str], typer.Option(help="Where to trace, and what --compile compiles for: cpu, cuda.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model as a folder that runs without torch, and takes any concept at run time.

    The keys and values of all cross-attention layers are inputs of the exported UNet. The edit of a concept lives in them alone,
    so any runtime can draw every row of a batch with its own concepts, and without a custom operator.
    `perfusion generate --runtime onnx --model OUTPUT` draws with it, by numpy and onnxruntime.

    Every graph is run and compared with torch before the folder takes its name. A LoRA has to be fused first.

    Exit codes: 0 done, 2 bad input, 3 a model that is refused.
    """
    from tqdm import tqdm

    from perfusion.cli.checks import check_device
    from perfusion.cli.strict_json import strict_json
    from perfusion.exporting import export as write
    from perfusion.exporting.folder import check_replaceable
    from perfusion.models import load_pipeline

    if dtype is Precision.bfloat16:
        raise ValueError("--dtype must be float32 or float16, got bfloat16: the runtimes that read the graphs have no kernels for it.")
    check_replaceable(output, overwrite)
    check_device(device)
    import torch

    pipe = load_pipeline(model, device=device, dtype=torch.float32)
    if dtype is Precision.float16:
        for name, part in pipe.components.items():
            overflows = name == "vae" and getattr(part.config, "force_upcast", False)
            if isinstance(part, torch.nn.Module) and not overflows:
                torch.nn.Module.to(part, torch.float16)  # diffusers' own would remark on it
    with tqdm(desc="export", unit="graph", disable=None) as bar:

        def progress(part: str) -> None:
            bar.set_postfix_str(part)
            bar.update()

        result = write(
            pipe,
            output,
            format=format.value,
            scheduler=None if scheduler is None else scheduler.value,
            compile=compile,
            overwrite=overwrite,
            progress=progress,
        )
    sizes = {path.name: path.stat().st_size for path in sorted(output.iterdir())}
    if json:
        print(strict_json({"folder": str(output), "files": sizes, "differences": result.differences}))
        return
    worst = max(result.differences, key=result.differences.get)
    print(f"Wrote {output}: {len(sizes)} files, {sum(sizes.values()):,} bytes, for {result.manifest.base}.")
    print(f"Largest difference from torch: {result.differences[worst]:.2g} of the largest output, in the {worst}.")
    if format is Format.onnx:
        print(f"{shlex.join(['perfusion', 'generate', '...', '--runtime', 'onnx', '--model', str(output)])} draws with it.")
