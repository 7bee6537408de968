"""`perfusion doctor`: what this installation can do, and why not more."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from perfusion.cli.models import MODEL_HELP, LoraOption, add_parts
from perfusion.cli.strict_json import strict_json

if TYPE_CHECKING:
    import torch

REQUIRED = (
    *("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy"),
    *("huggingface-hub", "jinja2", "pillow", "platformdirs", "pyyaml", "tqdm", "typer"),
)
OPTIONAL = {
    "triton": "without it there are no Triton kernels",
    "peft": "needed for LoRA beside concepts",
    "onnxruntime": "needed to draw with an exported model",
    "onnx": "needed to export a model as ONNX",
    "onnxscript": "needed to export a model as ONNX",
    "fastapi": "needed for `perfusion serve`, as are uvicorn, sqlalchemy, prometheus-client and python-multipart",
    "tensorboard": "needed for training curves in a browser",
}
OLDEST_TORCH = (2, 10)
TOLERANCES = {32: 1e-3, 16: 1e-2}  # by bits, of results against float64, relative to the largest value; allows for tensor cores
PATHS = {"slots": "fast", "hooks": "hooks"}
WIDE = ("targets", "metric_targets", "bias", "temperature", "gates", "components")  # never of 16 bits


@dataclasses.dataclass(frozen=True)
class Finding:
    """state: "ok", "off" (could be better, nothing is broken) or "bad"."""

    area: str
    name: str
    state: str
    detail: str

    def __str__(self) -> str:
        return f"{self.state:<4}{self.area:<10}{self.name:<23} {self.detail}".rstrip()


def doctor(
    model: Annotated[
        Optional[str], typer.Option(help=f"Also say which path concepts take in each layer of a model. {MODEL_HELP}")
    ] = None,
    lora: LoraOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what this installation can do, and why not more.

    Lists versions, devices, which implementations of the operators run here and why the others do not, compilers, the
    built-in model and the cache, and computes every operator once against float64. In front of each line: "ok"; "off",
    something that is not there and is not needed; or "bad". Nothing is written and nothing is downloaded, but a model by its id.

    With --model, each cross-attention layer of the model is listed with the path that concepts take in it, and the reason: "fast",
    where keys and values are computed once per prompt, or "hooks", the compatibility path. handle.explain() says it in the same words.

    Exit codes: 0 all is well, 1 something is bad.
    """
    findings = []
    for finding in itertools.chain(examine(), _layers(model, lora)):
        findings.append(finding)
        if not json:
            print(finding, flush=True)
    bad = [finding for finding in findings if finding.state == "bad"]
    if json:
        report = {"healthy": not bad, "findings": [dataclasses.asdict(finding) for finding in findings]}
        print(strict_json(report | {"compiled_kernels": _compiled_kernels()}))
    else:
        print(f"\n{len(bad)} of these must be repaired." if bad else "\nAll is well.")
    raise typer.Exit(1 if bad else 0)


def examine() -> Iterator[Finding]:
    """Everything the doctor looks at, in order. Where torch cannot be imported, the rest is left out."""
    yield from _software()
    yield from _compilers()
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("software", "import torch", "bad", f"{type(error).__name__}: {error}")
        return
    yield from _devices()
    yield from _backends()
    yield from _compiled()
    yield from _operators(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    yield from _toybox()
    yield from _cache()


def _software() -> Iterator[Finding]:
    from perfusion import __version__

    yield Finding("software", "perfusion", "ok", f"{__version__}, {Path(__file__).parents[1]}")
    yield Finding("software", "python", "ok", f"{platform.python_version()}, {platform.platform()}")
    for name in (*REQUIRED, *OPTIONAL):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing = "required, and not installed" if name in REQUIRED else f"not installed: {OPTIONAL[name]}"
            yield Finding("software", name, "bad" if name in REQUIRED else "off", missing)
            continue
        too_old = name == "torch" and tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH
        yield Finding("software", name, "bad" if too_old else "ok", f"{version}{', older than 2.10' if too_old else ''}")


def _compilers() -> Iterator[Finding]:
    for name, commands in {"nvcc": ["nvcc"], "c++": [os.environ.get("CXX", ""), "c++", "g++", "clang++"]}.items():
        path = next(filter(None, map(shutil.which, filter(None, commands))), None)
        if path is None:
            yield Finding("compiler", name, "off", "not found; needed only to build or develop kernels")
            continue
        lines = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.splitlines() or ["no version"]
        yield Finding("compiler", name, "ok", f"{next((line for line in lines if 'release' in line), lines[0]).strip()}, {path}")


def _devices() -> Iterator[Finding]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("device", "cpu", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} in use, {capability}")
    if not torch.cuda.is_available():
        why = "no CUDA device is visible" if torch.version.cuda else "this PyTorch is built without CUDA"
        yield Finding("device", "cuda", "off", f"{why}: everything runs, slowly, on the CPU")
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        yield Finding(
            "device", f"cuda:{number}", "ok", f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
        )


def _backends() -> Iterator[Finding]:
    import perfusion_kernels

    for backend in perfusion_kernels.available_backends():
        detail = ", ".join(backend.operators) if backend.available else backend.reason
        yield Finding("backend", backend.name, "ok" if backend.available else "off", detail)


def _compiled_kernels() -> dict[str, Any]:
    try:
        import perfusion_kernels
    except (ImportError, OSError) as error:
        return {"reason": f"{type(error).__name__}: {error}"}
    return perfusion_kernels.compiled_kernels()


def _compiled() -> Iterator[Finding]:
    """What the CUDA library holds, which is another question than whether it can run here."""
    compiled = _compiled_kernels()
    if "reason" in compiled:
        yield Finding("compiled", "cuda", "off", compiled["reason"])
        return
    kernels = compiled["kernels"]
    registers = [kernel["registers"] for kernel in kernels]
    spilling = sum(bool(kernel["spills"] or kernel["stack"]) for kernel in kernels)
    shared, largest = max((kernel["static_shared_memory"] + (kernel["dynamic_shared_memory"] or 0), _named(kernel)) for kernel in kernels)
    details = (
        f"{len(kernels)} kernels for {', '.join(compiled['architectures'])} by CUDA {compiled['cuda']}",
        f"{min(registers)} to {max(registers)} registers",
        f"{spilling or 'none'} with spills",
        f"up to {shared / 1024:.0f} KiB of shared memory ({largest})",
    )
    yield Finding("compiled", "cuda", "ok", ", ".join(details))


def _named(kernel: dict[str, Any]) -> str:
    return f"{kernel['kernel']}, {kernel['tile']}" if kernel["tile"] else kernel["kernel"]


def _operators(device: torch.device) -> Iterator[Finding]:
    """Every operator of every backend against the reference in float64: in float32, or in float16, which compiled kernels take."""
    import torch

    import perfusion_kernels

    exact_inputs = _inputs(torch.device("cpu"), torch.float64)
    for backend in perfusion_kernels.available_backends():
        dtype = torch.float16 if backend.name == "cuda" else torch.float32
        inputs = _inputs(device, dtype)
        for name in backend.operators:
            try:
                error = _difference(_run(name, inputs, backend.name), _run(name, exact_inputs, "reference"))
            except perfusion_kernels.BackendUnavailable as reason:  # here, this way: kernels for a GPU, where there is none
                yield Finding("operator", name, "off", str(reason).removeprefix(f"{name}: "))
                continue
            except Exception as reason:  # whatever it is, it is what the doctor was called for
                yield Finding("operator", name, "bad", f"{backend.name} on {device.type}: {type(reason).__name__}: {reason}")
                continue
            state = "ok" if error <= TOLERANCES[torch.finfo(dtype).bits] else "bad"  # NaN is not <= anything
            yield Finding("operator", name, state, f"{backend.name} on {device.type}: largest error {error:.1e} of the largest value")


def _inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A small case by argument name: two rows of a batch, one with two concepts and one with one. Its numbers have 16 bits in any dtype."""
    import torch

    import perfusion_kernels

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).half().double()

    rows, tokens, width, slots, heads, head_width, pixels = 2, 77, 64, 3, 2, 32, 64
    outputs = heads * head_width
    targets, encodings = draw(slots, width), draw(rows, tokens, width)
    encodings[:, 5] = targets[0]
    index = torch.tensor([[0, 2], [1, -1]], dtype=torch.int32)
    bias, temperature = torch.full((rows, 2), 0.7, dtype=torch.float64), torch.full((rows, 2), 0.15, dtype=torch.float64)
    gates, components = perfusion_kernels.concept_gates(encodings, targets, targets, index, bias, temperature, backend="reference")
    inputs = {
        **dict(encodings=encodings, targets=targets, metric_targets=targets, bias=bias, temperature=temperature),
        **dict(gates=gates, components=components, weight=draw(outputs, width), outputs=draw(slots, outputs)),
        **{name: draw(slots, outputs) for name in ("projected_targets", "key_outputs", "key_targets", "value_outputs", "value_targets")},
        **{name: draw(outputs, width) / 8 for name in ("key_weight", "value_weight")},
        **{name: draw(rows, tokens, heads, head_width) for name in ("key", "value")},
        "query": draw(rows, pixels, heads, head_width),
        **{name: draw(rows, pixels, width) for name in ("hidden_states", "residual")},
        **dict(query_weight=draw(outputs, width) / 8, output_weight=draw(width, outputs), output_bias=draw(width)),
    }
    wide = torch.float32 if dtype == torch.float16 else dtype
    moved = {name: tensor.to(device, wide if name in WIDE else dtype) for name, tensor in inputs.items()}
    return {"index": index.to(device), **moved}


def _run(name: str, inputs: dict[str, Any], backend: str) -> tuple[torch.Tensor, ...]:
    import perfusion_kernels

    operator = getattr(perfusion_kernels, name)
    arguments = {key: inputs[key] for key in inspect.signature(operator).parameters if key in inputs}
    result = operator(**arguments, backend=backend)
    return result if isinstance(result, tuple) else (result,)


def _difference(results: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> float:
    errors = [(a.cpu().double() - b).abs().max() / b.abs().max() for a, b in zip(results, exact)]
    return max((error.item() for error in errors), key=lambda error: (error != error, error))


def _toybox() -> Iterator[Finding]:
    from perfusion.files import size_text
    from perfusion.models import TOYBOX, load_pipeline

    if not TOYBOX.is_dir():
        yield Finding("model", "toybox", "bad", f"{TOYBOX} is missing: install perfusion-kernels again")
        return
    try:
        pipe = load_pipeline("toybox", device="cpu")
    except Exception as error:
        yield Finding("model", "toybox", "bad", f"{type(error).__name__}: {error}")
        return
    parameters = sum(p.numel() for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())
    size = size_text(sum(file.stat().st_size for file in TOYBOX.rglob("*") if file.is_file()))
    yield Finding("model", "toybox", "ok", f"loads; {parameters / 1e6:.1f} million parameters, {size}")


def _layers(model: str | None, loras: list[str] | None) -> Iterator[Finding]:
    """The path of a concept in each cross-attention layer of a model."""
    from perfusion.errors import UnsupportedPipeline

    if model is None:
        if loras:
            raise ValueError("--lora goes into a model: give one with --model.")
        return
    from perfusion.handle import attach
    from perfusion.models import load_pipeline

    pipe = load_pipeline(model, device="cpu")
    add_parts(pipe, model, None, loras)
    try:
        handle = attach(pipe)
    except UnsupportedPipeline as reason:
        yield Finding("model", type(pipe).__name__, "bad", str(reason))
        return
    with handle:
        yield Finding("model", type(pipe).__name__, "ok", str(handle.base))
        for name, (path, reason) in handle.layer_paths().items():
            yield Finding("layer", name, "ok" if path == "slots" else "off", f"{PATHS[path]}. {reason}")


def _cache() -> Iterator[Finding]:
    from perfusion.covariance import cache_folder

    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        why = "cannot be written: covariances are computed anew each time. Set PERFUSION_CACHE to a folder that can"
        yield Finding("cache", "covariance", "off", f"{folder} {why}")
        return
    held = len(list(folder.glob("*.safetensors")))
    yield Finding("cache", "covariance", "ok", f"{folder}, {held} file{'' if held == 1 else 's'}")
