"""`perfusion generate`: pictures of prompts that name concepts."""

from __future__ import annotations

import contextlib
import enum
import math
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from perfusion.cli.checks import check_device, refuse_existing
from perfusion.cli.convert import Precision
from perfusion.cli.strict_json import strict_json

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from perfusion.concept import Concept
    from perfusion.handle import Handle


class RuntimeName(str, enum.Enum):
    torch = "torch"
    onnx = "onnx"


PER_CONCEPT = "VALUE for every concept, or NAME=VALUE for one; by default as the concept's file says."


def generate(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT", help='What to draw: "a <teddy> on the beach".', show_default=False)
    ],
    concept: Annotated[
        Optional[list[str]], typer.Option(metavar="FILE", help="A concept, or NAME=FILE to write it <NAME>. May be repeated.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="toybox, or a checkpoint in diffusers' folder format; with --runtime onnx what `perfusion export` wrote.")
    ] = "toybox",
    runtime: Annotated[RuntimeName, typer.Option(help="What computes: torch, or onnxruntime and numpy.")] = RuntimeName.torch,
    output: Annotated[Path, typer.Option(help="The picture; the contact sheet where there are several.")] = Path("perfusion.png"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures that are there.")] = False,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt, with seeds that count up.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The first picture's seed. The same seed gives the same picture.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="How far to follow the prompt, 0 to 100; 1 switches guidance off.")] = 6.0,
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

    With one prompt and --count 1, --output is the picture. With more it is a contact sheet, one row per prompt, and the
    pictures stand beside it: out.png, out-1.png, out-2.png ... Each holds its prompt, seed and settings as PNG text. What
    is there already is never replaced without --overwrite. Ctrl-C keeps the pictures that are finished and names them.

    Exit codes: 0 done, 2 bad input, 3 a concept or model that is refused, 130 interrupted.
    """
    files = _files(output, len(prompts) * count, overwrite)
    if not 0 <= guidance_scale <= 100:  # nor is NaN
        raise ValueError(f"--guidance-scale must be a number from 0 to 100, got {guidance_scale:g}")
    sources = [_source(text) for text in concept or ()]
    given = {"strength": strength, "bias": bias, "temperature": temperature}
    settings = [_setting(key, text) for key, texts in given.items() for text in texts or ()]

    from perfusion.contact_sheet import sheet

    with (_onnx if runtime is RuntimeName.onnx else _torch)(model, sources, device, dtype) as (handle, concepts, tokens, draw):
        used = _load(handle, concepts, settings)
        handle.check([*prompts, negative_prompt])  # a mistake in the last prompt is found before the first one is drawn
        _doubt(handle, tokens, [*prompts, negative_prompt])
        facts = {
            "model": Path(model).name,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "concepts": used,
        }
        jobs = [(prompt, seed + number) for prompt in prompts for number in range(count)]
        images = []
        try:
            for (prompt, number), file, image in zip(jobs, files, _draw(draw, jobs, steps, guidance_scale, negative_prompt, batch_size)):
                _save(image, file, _metadata(prompt, number, facts))
                images.append(image)
        except BaseException:
            _say_what_is_finished(files, len(images))
            raise
    if len(files) > 1:
        columns = count if len(prompts) > 1 else math.ceil(math.sqrt(count))
        titles = [f"seed {number}" for _, number in jobs]
        _save(sheet(images, columns, titles=titles), output, _metadata("\n".join(prompts), seed, facts))

    if json:
        pictures = [{"file": str(file), "prompt": prompt, "seed": number} for (prompt, number), file in zip(jobs, files)]
        print(strict_json({**facts, "pictures": pictures, "sheet": str(output) if len(files) > 1 else None}))
    elif len(files) > 1:
        print(f"Wrote {output}, a contact sheet of {len(files)} pictures, and {files[0]} to {files[-1].name}.")
    else:
        print(f"Wrote {output}.")


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
    """FILE, or NAME=FILE; a file whose own name holds "=" is a FILE."""
    name, equals, path = text.partition("=")
    return (None, Path(text)) if not equals or Path(text).exists() else (name, Path(path))


def _setting(key: str, text: str) -> tuple[str, str | None, float]:
    """VALUE, or NAME=VALUE."""
    name, equals, value = text.rpartition("=")
    try:
        return key, (name if equals else None), float(value)
    except ValueError:
        raise ValueError(f"--{key} must be a number or NAME=NUMBER, got {text!r}") from None


@contextlib.contextmanager
def _torch(model: str, sources: list[tuple[str | None, Path]], device: str | None, dtype: Precision | None) -> Iterator[Any]:
    """The handle, the concepts' files read, the tokenizer's own words, and what draws a batch; with torch and diffusers."""
    import torch

    from perfusion.concept import Concept
    from perfusion.handle import attach
    from perfusion.models import load_pipeline
    from perfusion.text import added_tokens

    concepts = [(name, path, Concept.load(path)) for name, path in sources]
    check_device(device)
    pipe = load_pipeline(model, device=device, dtype=None if dtype is None else getattr(torch, dtype.value))

    def draw(
        prompts: list[str], seeds: list[int], steps: int, guidance_scale: float, negative_prompt: str, advance: Callable[[], None]
    ) -> list[Image.Image]:
        def step_end(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            advance()
            return tensors

        return pipe(
            prompts,
            negative_prompt=[negative_prompt] * len(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            # on the CPU, so that a seed means the same picture on every device
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            callback_on_step_end=step_end,
        ).images

    with attach(pipe, capacity=max(1, len(concepts))) as handle:
        yield handle, concepts, added_tokens(pipe), draw


@contextlib.contextmanager
def _onnx(model: str, sources: list[tuple[str | None, Path]], device: str | None, dtype: Precision | None) -> Iterator[Any]:
    """The same by numpy and onnxruntime; neither torch nor diffusers is imported."""
    from perfusion.runtime import Concept, Request, Runtime

    for option, value in {"--device": device, "--dtype": dtype}.items():
        if value is not None:
            raise ValueError(f"{option} is for --runtime torch: an export has its number format, and onnxruntime its devices.")
    concepts = [(name, path, Concept.load(path)) for name, path in sources]
    runtime = Runtime(model)

    def draw(
        prompts: list[str], seeds: list[int], steps: int, guidance_scale: float, negative_prompt: str, advance: Callable[[], None]
    ) -> list[Image.Image]:
        requests = [
            Request(prompt=prompt, negative_prompt=negative_prompt, seed=seed, guidance_scale=guidance_scale)
            for prompt, seed in zip(prompts, seeds)
        ]
        return runtime.generate(requests, steps=steps, progress=lambda step: advance())

    yield runtime, concepts, runtime.text.words, draw


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


def _save(image: Image.Image, file: Path, metadata: Any) -> None:
    from perfusion.files import whole

    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as draft:
        image.save(draft, pnginfo=metadata)


def _say_what_is_finished(files: Sequence[Path], finished: int) -> None:
    """After an interrupt or an error in the midst of the pictures: which of them are there."""
    if finished:
        which = f"{files[0]} is" if finished == 1 else f"{files[0]} to {files[finished - 1].name} are"
        print(f"Stopped after {finished} of {len(files)} pictures: {which} finished, the contact sheet is not made.", file=sys.stderr)


def _draw(
    draw: Callable[..., list[Image.Image]],
    jobs: list[tuple[str, int]],
    steps: int,
    guidance_scale: float,
    negative_prompt: str,
    batch_size: int,
) -> Iterator[Image.Image]:
    from tqdm import tqdm

    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    with tqdm(total=steps * len(batches), desc="generate", unit="step", disable=None) as bar:
        for batch in batches:
            prompts, seeds = zip(*batch)
            yield from draw(list(prompts), list(seeds), steps, guidance_scale, negative_prompt, bar.update)


def _metadata(prompt: str, seed: int, facts: dict[str, Any]) -> Any:
    from PIL.PngImagePlugin import PngInfo

    from perfusion import __version__

    info = PngInfo()
    for key, value in {"prompt": prompt, "seed": str(seed), "perfusion": strict_json({"version": __version__, **facts})}.items():
        info.add_text(key, value)
    return info
