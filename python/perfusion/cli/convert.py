"""`perfusion convert`: a concept for other programs, or from a checkpoint of another implementation."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Optional

import typer

from perfusion.cli.checks import refuse_existing
from perfusion.cli.models import MODEL_HELP, Precision


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="FILE", help="With --to a concept, otherwise the checkpoint to import.", show_default=False)
    ],
    to: Annotated[
        Optional[str], typer.Option(help="lora, embedding, a1111 or comfyui: write the concept for other programs.", show_default=False)
    ] = None,
    scale: Annotated[
        Optional[float], typer.Option(help="With --to: the LoRA's strength κ. By default fitted to the gate.", show_default=False)
    ] = None,
    name: Annotated[
        Optional[str], typer.Option(help="What to call the concept: a-z, 0-9, - and _. Needed for an import.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(help=f"The model it was trained on. {MODEL_HELP}")] = "toybox",
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
    """Turn a concept into files for other programs, or a checkpoint of another implementation into a concept file.

    With --to, FILE is a concept. lora: for diffusers and peft, a LoRA of rank one for each projection and the word as a textual
    inversion; embedding: the word alone; a1111 and comfyui: the same under the names and in the folders of these programs. A LoRA
    has no gate: a linear function stands in for it, whose strength is fitted, and what is lost is printed. --output is a folder then.

    Without --to, FILE is a checkpoint. Reads what lucidrains/perfusion-pytorch saves, as a package or inside a state dict, and the
    .ckpt files of
    ChenDarYen/Key-Locked-Rank-One-Editing. The base model is needed: its weights give what the checkpoints leave out. All
    that is found, approximated or doubtful is printed. Nothing in the checkpoint is executed.

    Exit codes: 0 done, 2 bad input, 3 a checkpoint or model that is refused.
    """
    import torch

    from perfusion import convert as converter
    from perfusion.concept import check_name
    from perfusion.covariance import Covariance
    from perfusion.models import load_pipeline

    if to is not None:
        _export(checkpoint, to, model, output, scale, overwrite, dtype)
        return
    if name is None:
        raise ValueError("--name must be given for an import: what to call the concept. To write a concept for other programs, say --to.")
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
    print(f"Wrote {output}, {output.stat().st_size:,} bytes. `{shlex.join(['perfusion', 'inspect', str(output)])}` shows it.")


def _export(file: Path, to: str, model: str, output: Path | None, scale: float | None, overwrite: bool, dtype: Precision) -> None:
    import torch

    from perfusion.concept import Concept
    from perfusion.models import load_pipeline
    from perfusion.other_formats import export, file_names

    concept = Concept.load(file if file.exists() else str(file))
    folder = Path() if output is None and to in ("lora", "embedding") else output or Path(f"{concept.name}-{to}")
    refuse_existing([folder / name for name in file_names(concept, to)], overwrite)
    files, notes = export(concept, load_pipeline(model, device="cpu"), to, folder, scale=scale, dtype=getattr(torch, dtype.value))
    for note in notes:
        print(note)
    print(f"Wrote {', '.join(f'{file} ({file.stat().st_size:,} bytes)' for file in files)}.")
