"""`perfusion convert`: a concept from a checkpoint of another implementation."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from perfusion.cli.checks import refuse_existing


class Precision(str, enum.Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The checkpoint to import.", show_default=False)],
    name: Annotated[str, typer.Option(help="What to call the concept: a-z, 0-9, - and _.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="The model it was trained on: toybox, or a checkpoint in diffusers' folder format.", show_default=False)
    ],
    superclass: Annotated[
        Optional[str], typer.Option(help="What the concept is one of, in one word. Needed where the checkpoint does not say it.")
    ] = None,
    output: Annotated[Optional[Path], typer.Option(help="The file to write. By default NAME.safetensors in this folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it is there.")] = False,
    dtype: Annotated[Precision, typer.Option(help="Number format of the file.")] = Precision.float16,
    index: Annotated[Optional[int], typer.Option(help="Which concept, from 0, where the checkpoint holds several.")] = None,
    covariance: Annotated[
        Optional[Path], typer.Option(help="A covariance file, for checkpoints that hold none; `perfusion covariance` writes it.")
    ] = None,
    bias: Annotated[float, typer.Option(help="The gate's bias at use: lower means more identity, higher more of the prompt.")] = 0.70,
    temperature: Annotated[float, typer.Option(help="The gate's temperature at use.")] = 0.15,
    author: Annotated[str, typer.Option(help="Who made the concept.")] = "",
    license: Annotated[str, typer.Option(help="Its licence, such as CC-BY-4.0.")] = "",
) -> None:
    """Turn a checkpoint of another implementation into a concept file.

    Reads what lucidrains/perfusion-pytorch saves, as a package or inside a state dict, and the .ckpt files of
    ChenDarYen/Key-Locked-Rank-One-Editing. The base model is needed: its weights give what the checkpoints leave out. All
    that is found, approximated or doubtful is printed. Nothing in the checkpoint is executed.

    Exit codes: 0 done, 2 bad input, 3 a checkpoint or model that is refused.
    """
    import torch

    from perfusion import convert as converter
    from perfusion.concept import check_name
    from perfusion.covariance import Covariance
    from perfusion.models import load_pipeline

    check_name(name)
    output = Path(f"{name}.safetensors") if output is None else output
    refuse_existing([output], overwrite)
    checkpoint.stat()  # what is not there is named before a model is loaded
    concept, notes = converter.convert(
        checkpoint,
        load_pipeline(model, device="cpu"),
        name=name,
        superclass=superclass,
        covariance=None if covariance is None else Covariance.load(covariance),
        index=index,
        bias=bias,
        temperature=temperature,
        author=author,
        license=license,
    )
    concept.save(output, dtype=getattr(torch, dtype.value))
    for note in notes:
        print(note)
    print(f"Wrote {output}, {output.stat().st_size:,} bytes. `perfusion inspect {output}` shows it.")
