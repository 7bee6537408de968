"""`perfusion train`: learn a concept from a folder of pictures."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from perfusion.cli.checks import check_device
from perfusion.cli.models import MODEL_HELP, EmbeddingOption, LoraOption, Precision, PredictionOption, TextBitsOption, VaeOption, add_parts
from perfusion.cli.settings_options import takes_settings
from perfusion.cli.strict_json import strict_json
from perfusion.training_config import TrainingConfig, read_settings

MISSING = {"--superclass": "what the thing is", "--name": "what prompts will call it"}


@takes_settings(TrainingConfig)
def train(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder with 4 to 7 pictures of the thing.", show_default=False)],
    output: Annotated[Optional[Path], typer.Option(help="Folder to write; by default concepts/NAME.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the folder holds of another run.")] = False,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "toybox",
    vae: VaeOption = None,
    prediction: PredictionOption = None,
    text_encoder_bits: TextBitsOption = None,
    embedding: EmbeddingOption = None,
    lora: LoraOption = None,
    config: Annotated[Optional[Path], typer.Option(help="YAML file with any of the settings; options go before it.")] = None,
    clipseg: Annotated[
        Optional[Path], typer.Option(help="Folder with CLIPSeg weights, to find the thing in pictures without a mask.")
    ] = None,
    covariance: Annotated[Optional[Path], typer.Option(help="A file by `perfusion covariance`; by default found or computed.")] = None,
    resume: Annotated[
        Optional[str],
        typer.Option("--resume", "--resume-from-checkpoint", help="latest, a checkpoint or its bare name, or the folder of a run."),
    ] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, mps; by default CUDA where there is one.")] = None,
    dtype: Annotated[
        Optional[Precision], typer.Option(help="Of the frozen model. By default float32 on a CPU, bfloat16 elsewhere.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    **settings: Any,
) -> None:
    """Learn a concept from a few pictures: a word, and what its values are in every cross-attention layer.

    IMAGES is a folder. Beside NAME.png there may be NAME.txt or NAME.caption, captions that write the concept as <name>, * or {},
    and a mask, NAME-masklabel.png, NAME.mask.png, NAME_mask.png or NAME-mask.png, white where the thing is. An alpha channel that
    is not opaque everywhere is a mask, too. All pictures have a mask, or none has. Captions that say where the thing stands, and
    masks, keep the background out of the concept: they make it better. Files that are none of these are named before training.

    Pictures are cropped to a square around the mask's centre, or to the middle one where there is no mask; --buckets keeps their shape.

    The output folder gets NAME.safetensors (some 30 KB for Stable Diffusion 1.x), README.md with a gallery, config.yaml,
    log.jsonl, curves for TensorBoard, validation pictures and checkpoints. Ctrl-C, a signal and any error keep a checkpoint;
    --resume latest goes on from it, and ends as if it had never stopped. Files that are there already, of another run or of
    anybody, are replaced with --overwrite only.

    Exit codes: 0 done, 2 bad input, 3 a model that is refused, 130 interrupted.
    """
    given = {key: value for key, value in settings.items() if value not in (None, [])}
    settings = given if config is None else {**read_settings(config), **given}
    missing = [f"--{key}" for key in ("superclass", "name") if key not in settings]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given: {', and '.join(MISSING[option] for option in missing)}.")

    import torch

    from perfusion.concept import check_name
    from perfusion.covariance import Covariance
    from perfusion.models import load_pipeline
    from perfusion.training import train as learn
    from perfusion.training.folder import beginning

    checked = TrainingConfig(**settings)  # refuses what cannot be before a model is loaded
    check_name(checked.name)
    folder = output or Path("concepts") / checked.name
    beginning(folder, images, resume, checked, overwrite)
    check_device(device)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None and device != "cpu":
        dtype = Precision.bfloat16  # the gradient of a float16 model overflows easily
    pipe = load_pipeline(
        model, device=device, dtype=None if dtype is None else getattr(torch, dtype.value), vae=vae, prediction_type=prediction,
        text_encoder_bits=text_encoder_bits,
    )
    add_parts(pipe, model, embedding, lora)
    concept = learn(
        pipe, images, output=folder, clipseg=clipseg, resume=resume, overwrite=overwrite, progress=not json,
        covariance=None if covariance is None else Covariance.load(covariance), **settings,
    )  # fmt: skip
    path = folder / f"{concept.name}.safetensors"
    if json:
        print(
            strict_json(
                {
                    "file": str(path),
                    "bytes": path.stat().st_size,
                    "name": concept.name,
                    "superclass": concept.superclass,
                    "recipe": concept.recipe,
                }
            )
        )
    else:
        beside = ["README.md", "gallery.png", "references.png", "config.yaml", "log.jsonl"]
        beside = [name for name in beside if (folder / name).is_file()]  # a picture that could not be drawn is not there
        beside += [f"{name}/" for name in ("validation", "checkpoints", "tensorboard") if (folder / name).is_dir()]
        print(f"Wrote {path} ({path.stat().st_size:,} bytes) and, beside it, {', '.join(beside)}.")
        command = ["perfusion", "generate", f"a photo of a <{concept.name}>", "--concept", str(path), "--model", model]
        print(f"Try: {shlex.join(command)}")
