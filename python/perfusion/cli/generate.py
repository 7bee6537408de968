"""`perfusion generate`: pictures of prompts that name concepts."""

from __future__ import annotations

import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from perfusion.cli.checks import refuse_existing
from perfusion.cli.drawing import SCHEDULERS, Cell, cells
from perfusion.cli.models import MODEL_HELP, EmbeddingOption, LoraOption, Precision, PredictionOption, TextBitsOption, VaeOption
from perfusion.cli.runtimes import RuntimeName, onnx_session, torch_session
from perfusion.cli.strict_json import strict_json
from perfusion.families import CUSTOM, FAMILIES
from perfusion.files import user_path

if TYPE_CHECKING:
    from PIL import Image

    from perfusion.concept import Concept
    from perfusion.handle import Handle

TOYBOX = FAMILIES["toybox"]
PER_CONCEPT = "VALUE for every concept, or NAME=VALUE for one; by default as the concept's file says."


def _usual(setting: str) -> str:
    return f"by default what suits the model: {getattr(CUSTOM, setting):g}, toybox {getattr(FAMILIES['toybox'], setting):g}"


def generate(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT", help='What to draw: "a <teddy> on the beach".', show_default=False)
    ],
    concept: Annotated[
        Optional[list[str]],
        typer.Option(metavar="FILE", help="A concept, or user/concept on the hub; NAME=FILE to write it <NAME>. May be repeated."),
    ] = None,
    model: Annotated[str, typer.Option(help=f"{MODEL_HELP} With --runtime onnx what `perfusion export` wrote.")] = "toybox",
    runtime: Annotated[RuntimeName, typer.Option(help="What computes: torch, or onnxruntime and numpy.")] = RuntimeName.torch,
    vae: VaeOption = None,
    prediction: PredictionOption = None,
    text_encoder_bits: TextBitsOption = None,
    embedding: EmbeddingOption = None,
    lora: LoraOption = None,
    scheduler: Annotated[
        Optional[str], typer.Option(help=f"{', '.join(SCHEDULERS)}; by default the model's own.", show_default=False)
    ] = None,
    width: Annotated[
        Optional[int], typer.Option(min=8, max=16384, help="Of a picture in pixels; by default the model's.", show_default=False)
    ] = None,
    height: Annotated[Optional[int], typer.Option(min=8, max=16384, help="Likewise.", show_default=False)] = None,
    init_image: Annotated[Optional[Path], typer.Option(help="A picture to start from.")] = None,
    init_strength: Annotated[float, typer.Option(min=0, max=1, help="How much of it may change, 0 to 1.")] = 0.8,
    mask_image: Annotated[Optional[Path], typer.Option(help="With --init-image: white where the picture is drawn anew.")] = None,
    control_image: Annotated[Optional[Path], typer.Option(help="A picture for --controlnet, such as edges or a pose.")] = None,
    controlnet: Annotated[Optional[Path], typer.Option(help="Folder of a ControlNet in diffusers' format.")] = None,
    grid: Annotated[
        Optional[list[str]],
        typer.Option(metavar="SETTING=VALUES", help="Columns of the sheet: steps=10,30; bias=0.5,0.7; <name>.strength=0.5,1."),
    ] = None,
    output: Annotated[Path, typer.Option(help="The picture; the contact sheet where there are several.")] = Path("perfusion.png"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures that are there.")] = False,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt, with seeds that count up.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The first picture's seed. The same seed gives the same picture.")] = 0,
    steps: Annotated[
        Optional[int], typer.Option(min=1, help=f"Denoising steps; {_usual('steps')}.", show_default=False)
    ] = None,
    guidance_scale: Annotated[
        Optional[float],
        typer.Option(
            help=f"How far to follow the prompt, 0 to 100; 1 switches guidance off; {_usual('guidance_scale')}.",
            show_default=False,
        ),
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What not to draw.")] = "",
    strength: Annotated[
        Optional[list[str]],
        typer.Option(metavar="VALUE", help="0 to 4. VALUE for every concept, or NAME=VALUE for one. [default: 1, as learned]"),
    ] = None,
    bias: Annotated[
        Optional[list[str]], typer.Option(metavar="VALUE", help=f"Lower: more of the concept; higher: more of the prompt. {PER_CONCEPT}")
    ] = None,
    temperature: Annotated[
        Optional[list[str]], typer.Option(metavar="VALUE", help=f"How sharply the concept is told from other words. {PER_CONCEPT}")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 4,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, mps; by default CUDA where there is one.")] = None,
    dtype: Annotated[Optional[Precision], typer.Option(help="By default float32 on a CPU and float16 elsewhere.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Draw pictures of prompts that name concepts.

    A prompt writes a concept as <name>, and may set it: <teddy:0.8> for strength 0.8, <teddy|bias=0.6,temperature=0.1>, or
    as other tools write it, <perfusion:teddy:0.8>. What a prompt sets goes before --strength, --bias and --temperature.

    --init-image starts from a picture, --mask-image redraws its white part alone, --control-image guides a --controlnet. --grid draws
    every prompt under several settings, a column each: --grid bias=0.5,0.6,0.7; more of them multiply.

    With one prompt and --count 1, --output is the picture. With more it is a contact sheet, one row per prompt, and the
    pictures stand beside it: out.png, out-1.png, out-2.png ... Each holds its prompt, seed and settings as PNG text. What
    is there already is never replaced without --overwrite. Ctrl-C keeps the pictures that are finished and names them.

    Exit codes: 0 done, 2 bad input, 3 a concept or model that is refused, 130 interrupted.
    """
    columns = cells(grid, steps=steps, guidance_scale=guidance_scale)
    files = _files(output, len(prompts) * count * len(columns), overwrite)
    for cell in columns:
        if cell.guidance_scale is not None and not 0 <= cell.guidance_scale <= 100:  # nor is NaN
            raise ValueError(f"--guidance-scale must be a number from 0 to 100, got {cell.guidance_scale:g}")
    sources = [_source(text) for text in concept or ()]
    given = {"strength": strength, "bias": bias, "temperature": temperature}
    settings = [_setting(key, text) for key, texts in given.items() for text in texts or ()]

    from perfusion.contact_sheet import sheet

    drawing = {
        "scheduler": scheduler, "width": width, "height": height, "init_image": init_image,
        "mask_image": mask_image, "control_image": control_image, "controlnet": controlnet,
    }  # fmt: skip
    if runtime is RuntimeName.onnx:
        unused = {"device": device, "dtype": dtype, "vae": vae, "prediction": prediction, "embedding": embedding, "lora": lora,
                  "text_encoder_bits": text_encoder_bits, **drawing}  # fmt: skip
        session = onnx_session(model, sources, {f"--{name.replace('_', '-')}": value for name, value in unused.items()})
    else:
        session = torch_session(
            model, sources, device, dtype,
            parts={"vae": vae, "prediction_type": prediction, "text_encoder_bits": text_encoder_bits}, embeddings=embedding, loras=lora,
            drawing={**drawing, "init_strength": init_strength},
        )  # fmt: skip
    with session as (family, handle, concepts, tokens, words, draw):
        columns = [cell.of(family) for cell in columns]
        used = _load(handle, concepts, settings)
        for cell in columns:
            cell.check(handle)
        handle.check([*prompts, negative_prompt])  # a mistake in the last prompt is found before the first one is drawn
        _doubt(handle, tokens, [*prompts, negative_prompt])
        facts = {
            "model": Path(model).name,
            "steps": columns[0].steps,
            "guidance_scale": columns[0].guidance_scale,
            "negative_prompt": negative_prompt,
            "concepts": used,
        }
        extra = {"scheduler": scheduler, "width": width, "height": height, "embeddings": words, "loras": lora}
        facts |= {key: value for key, value in extra.items() if value}
        jobs = [(prompt, seed + number, cell) for prompt in prompts for number in range(count) for cell in columns]
        images, written = [], []
        try:
            drawn = _draw(draw, handle, jobs, negative_prompt, batch_size)
            for (prompt, number, cell), file, image in zip(jobs, files, drawn):
                written.append(_save(image, file, _metadata(prompt, number, cell.facts(facts)), overwrite))
                images.append(image)
        except BaseException:
            _say_what_is_finished(written, len(files))
            raise
    files = written
    if len(files) > 1:
        wide = count * len(columns)
        across = wide if len(prompts) > 1 or len(columns) > 1 else math.ceil(math.sqrt(count))
        titles = [", ".join(filter(None, (f"seed {number}", cell.title))) for _, number, cell in jobs]
        output = _save(sheet(images, across, titles=titles), output, _metadata("\n".join(prompts), seed, facts), overwrite)

    if json:
        pictures = [
            {"file": str(file), "prompt": prompt, "seed": number, **({"settings": cell.title} if cell.title else {})}
            for (prompt, number, cell), file in zip(jobs, files)
        ]
        print(strict_json({**facts, "pictures": pictures, "sheet": str(output) if len(files) > 1 else None}))
    elif len(files) > 1:
        print(f"Wrote {output}, a contact sheet of {len(files)} pictures, and {files[0]} to {files[-1].name}.")
    else:
        print(f"Wrote {files[0]}.")


def _files(output: Path, pictures: int, overwrite: bool) -> list[Path]:
    """Where each picture goes; nothing that is to be written may be there."""
    from perfusion.writable import check_writable

    if output.suffix.lower() != ".png":
        raise ValueError(f"--output must be NAME.png, got {output if output.name else 'no name'}")
    digits = len(str(pictures))
    files = [output] if pictures == 1 else [output.with_stem(f"{output.stem}-{n:0{digits}}") for n in range(1, pictures + 1)]
    refuse_existing([output, *files], overwrite)
    folders = [str(file) for file in (output, *files) if file.is_dir()]
    if folders:
        raise ValueError(f"{folders[0]} is a folder, and a picture cannot take its place. Choose another --output.")
    check_writable(output.parent)
    return files


def _source(text: str) -> tuple[str | None, Path]:
    """FILE, or NAME=FILE; a file whose own name holds "=" is a FILE. A FILE may be an id on the hub."""
    name, equals, path = text.partition("=")
    alone = not equals or os.path.exists(os.path.expanduser(text))
    return (None, user_path(text)) if alone else (name, user_path(path))


def _setting(key: str, text: str) -> tuple[str, str | None, float]:
    """VALUE, or NAME=VALUE."""
    name, equals, value = text.rpartition("=")
    try:
        return key, (name if equals else None), float(value)
    except ValueError:
        raise ValueError(f"--{key} must be a number or NAME=NUMBER, got {text!r}") from None


def _load(
    handle: Handle, concepts: list[tuple[str | None, Path, Concept]], settings: list[tuple[str, str | None, float]]
) -> dict[str, Any]:
    """Load and set the concepts; what was used, by name."""
    files = {handle.load(concept, name): path.name for name, path, concept in concepts}
    for key, name, value in settings:
        chosen = list(files) if name is None else [name]
        if not set(chosen) <= set(files) or not files:
            raise ValueError(f"--{key}: there is no concept {name or 'to set'}; loaded are: {', '.join(files) or 'none'}")
        for each in chosen:
            handle.set(each, **{key: value})
    return {
        name: {
            "file": files[name],
            "superclass": loaded.superclass,
            "strength": loaded.strength,
            "bias": loaded.bias,
            "temperature": loaded.temperature,
        }
        for name, loaded in handle.concepts().items()
    }


def _doubt(handle: Handle, tokens: Collection[str], prompts: Sequence[str]) -> None:
    """Warn about what looks like a concept and is none, and about concepts that no prompt names."""
    from perfusion.prompts import near_tags, parse_prompt

    superclasses = {name: loaded.superclass for name, loaded in handle.concepts().items()}
    doubted = set[str]()
    named = {mention.name for prompt in prompts for mention in parse_prompt(prompt, superclasses, tokens).mentions}
    for prompt in dict.fromkeys(prompts):
        for near in near_tags(prompt, superclasses):
            doubted.update(re.findall(r"[\w-]+", near.lower()))
            warnings.warn(
                f"prompt {prompt!r}: {near!r} is drawn as plain text; a concept is written <name>, <name:0.8> or <name|bias=0.6>.",
                stacklevel=2,
            )
    for name in superclasses:
        if name not in named and name not in doubted:
            warnings.warn(f"no prompt names <{name}>, so its --concept changes nothing; write <{name}> where it should be.", stacklevel=2)


def _save(image: Image.Image, file: Path, metadata: Any, overwrite: bool) -> Path:
    """Write a picture; returns where. What has come there meanwhile, by another run, is not replaced: a free name is taken instead."""
    from perfusion.files import whole, whole_and_new

    file.parent.mkdir(parents=True, exist_ok=True)
    if overwrite:
        with whole(file) as draft:
            image.save(draft, pnginfo=metadata)
        return file
    with whole_and_new(file) as (draft, taken):
        image.save(draft, pnginfo=metadata)
    return taken()


def _say_what_is_finished(written: Sequence[Path], wanted: int) -> None:
    """After an interrupt or an error in the midst of the pictures: which of them are there."""
    if written:
        which = f"{written[0]} is" if len(written) == 1 else f"{written[0]} to {written[-1].name} are"
        print(f"Stopped after {len(written)} of {wanted} pictures: {which} finished, the contact sheet is not made.", file=sys.stderr)


def _draw(
    draw: Callable[..., list[Image.Image]], handle: Handle, jobs: list[tuple[str, int, Cell]], negative_prompt: str, batch_size: int
) -> Iterator[Image.Image]:
    """The picture of each job, in their order: those of one cell of the grid share batches."""
    from tqdm import tqdm

    drawn: dict[int, Image.Image] = {}
    batches = []
    for cell in dict.fromkeys(cell for _, _, cell in jobs):
        own = [number for number, job in enumerate(jobs) if job[2] == cell]
        batches += [(cell, own[start : start + batch_size]) for start in range(0, len(own), batch_size)]
    handed = 0
    with tqdm(total=sum(cell.steps for cell, _ in batches), desc="generate", unit="step", disable=None) as bar:
        for cell, numbers in batches:
            prompts, seeds, _ = zip(*(jobs[number] for number in numbers))
            with cell.set(handle):
                images = draw(list(prompts), list(seeds), cell.steps, cell.guidance_scale, negative_prompt, bar.update)
            drawn |= dict(zip(numbers, images))
            while handed in drawn:
                yield drawn.pop(handed)
                handed += 1


def _metadata(prompt: str, seed: int, facts: dict[str, Any]) -> Any:
    from PIL.PngImagePlugin import PngInfo

    from perfusion import __version__

    info = PngInfo()
    for key, value in {"prompt": prompt, "seed": str(seed), "perfusion": strict_json({"version": __version__, **facts})}.items():
        info.add_text(key, value)
    return info
