"""Small CUDA programs that measure what launch plans assume: read rates, mma.sync, launches. Compiled by nvcc into one library.

    python bench/microbenchmarks/__init__.py --architecture 9.0 --out FOLDER      # compiles; needs no GPU
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
LIBRARY = "libmicrobenchmarks.so"


def build(folder: Path, architecture: str) -> Path:
    """Compiles the library for a compute capability, "9.0", into `folder`. Raises RuntimeError with the reason if it cannot."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("there is no nvcc on PATH to compile the microbenchmarks with")
    number = architecture.replace(".", "")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{LIBRARY}.part"
    target = f"-gencode=arch=compute_{number},code=sm_{number}"
    command = [nvcc, "-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", target]
    ran = subprocess.run([*command, "-o", part, *sorted(FOLDER.glob("*.cu")), ROOT / "csrc/status.cpp"], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"the microbenchmarks do not compile: {ran.stderr.strip()[-500:]}")
    return part.rename(folder / LIBRARY)


@functools.cache
def load() -> ctypes.CDLL:
    """The library that $MICROBENCHMARKS names, or build/microbenchmarks. Raises RuntimeError with the reason if there is none."""
    path = Path(os.environ.get("MICROBENCHMARKS") or ROOT / "build" / "microbenchmarks" / LIBRARY)
    if not path.exists():
        raise RuntimeError(f"the microbenchmarks are not compiled: python {Path(__file__).relative_to(ROOT)} --architecture ...")
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.read_repeatedly.argtypes = [pointer, ctypes.c_int64, number, pointer, number, pointer]
    library.issue_products.argtypes = [pointer, number, number, pointer]
    library.multiply_matrices.argtypes = [*[pointer] * 3, *[number] * 5, pointer]
    library.launch_once.argtypes = [pointer, number, pointer]
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", required=True, help="a compute capability, as 9.0")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "microbenchmarks", help="a folder")
    options = parser.parse_args()
    try:
        print(build(options.out, options.architecture))
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
