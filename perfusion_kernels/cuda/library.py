"""The compiled library beside this file: whether it exists, what it holds, and whether it can run on a device.

setup.py puts it here, with build.json. It is loaded once: at the first call with a tensor on a GPU, or when `available_backends`
or `compiled_kernels` needs it. Importing this package loads nothing and queries no device.
"""

import ctypes
import functools
import json
import re
from pathlib import Path

import torch

from ..schemas import SCHEMAS, backward_schema
from . import registry

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "libperfusion_kernels_torch.so"


def compiled_kernels() -> dict:
    """The CUDA kernels of this installation, as a dict that JSON can hold. Loads the library; needs no GPU.

    architectures: "sm_80" for machine code, "compute_80" for PTX. cuda, torch: the versions that it was compiled with; sources:
    a digest of the compiled sources. kernels: one dict for each kernel and architecture: kernel, dtype and architecture; tile, its
    template arguments, as "head_dim 40, keys 80"; registers per thread; bytes of spills, stack, static_shared_memory, and
    dynamic_shared_memory of a launch without an edit, None where that depends on J. If the library cannot be loaded, it has
    `reason` in place of kernels. If nothing was compiled, the dict has `reason` only.
    """
    found = note()
    if "reason" in found:
        return dict(found)
    try:
        return {**found, "kernels": registry.kernels(loaded())}
    except OSError as error:
        return {**found, "reason": str(error)}
    except AttributeError:
        return {**found, "reason": f"{LIBRARY.name} was compiled for another version: it does not list its kernels; install again"}


@functools.cache
def note() -> dict:
    """build.json: architectures, cuda and torch, as compiled_kernels() has them, or reason alone. Loads nothing."""
    file = FOLDER / "build.json"
    if not file.exists():
        return {"reason": "this source tree has not been installed (pip install -e .)"}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {"reason": f"{file} cannot be read ({error}); install again"}


def absent() -> str | None:
    """Why the library cannot run on any device, as far as is known without loading it; None otherwise."""
    if reason := note().get("reason"):
        return f"not compiled: {reason}"
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    return None


@functools.cache
def loaded() -> ctypes.CDLL:
    """Loads the library, which registers its kernels with torch. Raises OSError with the reason."""
    try:
        torch.ops.load_library(str(LIBRARY))
        return ctypes.CDLL(str(LIBRARY))  # which is loaded already
    except OSError as error:
        raise OSError(f"{LIBRARY.name} does not load: {error.__cause__ or error}") from error


@functools.cache
def device_type() -> str:
    """Of the tensors that the loaded library takes: "cuda", or "cpu" where it was built for the host, without a CUDA runtime."""
    return "cuda" if cuda_versions(loaded())[0] else "cpu"


@functools.cache
def why_not_loaded() -> str | None:
    """Loads the library. Returns None, or why it must not be called."""
    try:
        library = loaded()
    except OSError as error:
        return str(error)
    library.perfusion_torch_signatures.restype = ctypes.c_char_p
    return outdated(library.perfusion_torch_signatures().decode()) or too_new(library)


def outdated(signatures: str) -> str | None:
    """Compares compiled signatures with the schemas: torch passes boxed arguments unchecked, so a kernel of another schema must not run."""
    for line in signatures.splitlines():
        name, compiled = re.fullmatch(r"(\w+)(\(.*)", line).groups()
        forward = name.removesuffix("_backward")
        if forward not in SCHEMAS:
            return f"{LIBRARY.name} has an operator {name}, which is not one here; install again"
        schema = types(SCHEMAS[forward] if name == forward else backward_schema(forward))
        if compiled != schema:
            return f"{LIBRARY.name} was compiled for another version: its {name} is {compiled}, here it is {schema}; install again"
    return None


def types(schema: str) -> str:
    """A schema without names: "(Tensor, Tensor?, float) -> Tensor"."""
    return re.sub(r" \w+(?=[,)])", "", schema)


def cuda_versions(library: ctypes.CDLL) -> tuple[int, int]:
    """Major versions of the library's CUDA runtime, 0 where it was built for the host, and of the driver, 0 where there is none."""
    runtime, driver = ctypes.c_int(), ctypes.c_int()
    library.perfusion_torch_cuda_versions(ctypes.byref(runtime), ctypes.byref(driver))
    return runtime.value, driver.value


def too_new(library: ctypes.CDLL) -> str | None:
    """Why the driver cannot run the library's CUDA runtime, or None. Within a major version of CUDA every driver can."""
    runtime, driver = cuda_versions(library)
    if 0 < driver < runtime:
        return (
            f"the kernels were compiled with CUDA {runtime}, and the driver here supports CUDA {driver}:"
            " it takes a newer driver, or an older nvcc and another installation"
        )
    return None


def runs_on(architectures: list[str], major: int, minor: int) -> bool:
    """Machine code runs on its compute capability and on later ones of its major version, PTX on all later ones. With suffix a, code
    runs on exactly its compute capability; with f, on its family."""
    for kind, code_major, code_minor, letter in (re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", each).groups() for each in architectures):
        code, here = (int(code_major), int(code_minor)), (major, minor)
        if letter == "a":
            fits = code == here
        elif letter == "f" or kind == "sm":
            fits = code[0] == major and code <= here
        else:
            fits = code <= here
        if fits:
            return True
    return False


@functools.cache
def why_not_on(device: int) -> str | None:
    """Why the library cannot run on this CUDA device, or None."""
    if reason := why_not_loaded():
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    compiled = note()["architectures"]
    if not runs_on(compiled, major, minor):
        return f"cuda:{device} has compute capability {major}.{minor}, and the kernels were compiled for {', '.join(compiled)}"
    return None


def unavailable() -> str | None:
    """Why no kernel of the library can run here, on any device; None if one can. Loads it and looks for devices."""
    if reason := absent() or why_not_loaded():
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    reasons = [why_not_on(device) for device in range(torch.cuda.device_count())]
    return None if None in reasons else "; ".join(filter(None, reasons))


@functools.cache
def shared_memory(device: int) -> int:
    """The bytes of shared memory that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def ask(question: str, *numbers: int) -> int:
    """A size limit from the C API. question: the function's name without its prefix, as "edited_attention_longest"."""
    function = getattr(loaded(), f"perfusion_{question}")
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64] * len(numbers)
    return function(*numbers)
