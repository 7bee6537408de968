"""pyproject.toml says everything but this: where nvcc is found, the CUDA kernels are compiled and go into the package.

CMake compiles them; CMakeLists.txt lists files and architectures. No GPU is looked for. Environment variables:

    PERFUSION_CUDA         0: leave the kernels out; 1: fail where they cannot be compiled
    TORCH_CUDA_ARCH_LIST   compute capabilities, as 8.0;9.0;10.0+PTX; all of them: 8.0;8.6;8.9;9.0;10.0+PTX;12.0
    CUDACXX, CUDA_HOME     where nvcc is, if not on PATH
    MAX_JOBS               files compiled at a time
    PERFUSION_MANYLINUX    1: for wheels that are given away, which load wherever there is glibc 2.28 or newer

perfusion_kernels/cuda/build.json says for what was compiled and with what, or why nothing was; the library lists its kernels itself.
`perfusion doctor` reads both.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Command, Distribution, setup
from setuptools.command.build import build

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones stop at pyproject.toml's licence, or have no bdist_wheel
    raise SystemExit(f"setup.py needs setuptools 77.0.3 or newer; this Python has {setuptools.__version__}: pip install -U setuptools")

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402

ROOT = Path(__file__).parent
LIBRARY = "libperfusion_kernels_torch.so"
OLDEST_TORCH, OLDEST_CMAKE = (2, 10), (3, 24)


def find_nvcc() -> str | None:
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    candidates = (os.environ.get("CUDACXX"), "nvcc", str(Path(toolkit, "bin", "nvcc")))
    return next(filter(None, (shutil.which(each) for each in candidates if each)), None)


def find_torch() -> Path | None:
    """The folder of the torch that is installed here, whose headers are needed; an isolated build hides it from imports."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(sysconfig.get_path(kind), "torch") for kind in ("platlib", "purelib")]
    return next((folder for folder in folders if _version((folder / "version.py")) >= OLDEST_TORCH), None)


def _version(file: Path) -> tuple[int, ...]:
    found = re.search(r"__version__ = '(\d+)\.(\d+)", file.read_text()) if file.exists() else None
    return tuple(map(int, found.groups())) if found else (0,)


def why_not() -> str | None:
    """Why the kernels are not compiled, or None if they are."""
    wish = os.environ.get("PERFUSION_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"PERFUSION_CUDA must be 0 or 1, or not set; got {wish!r}")
    reason = None
    if wish == "0":
        reason = "PERFUSION_CUDA was 0 when this was installed"
    elif find_nvcc() is None:
        reason = "there was no nvcc when this was installed"
    elif find_torch() is None:
        reason = "torch 2.10 or newer, whose headers are needed, was not there when this was installed: pip install torch, then this again"
    if reason and wish == "1":
        raise SystemExit(f"PERFUSION_CUDA is 1, but the CUDA kernels cannot be compiled: {reason}")
    return reason


def missing_tools() -> list[str]:
    """What pip is to bring for an isolated build."""
    ran = subprocess.run(["cmake", "--version"], capture_output=True, text=True).stdout if shutil.which("cmake") else "0.0"
    old = tuple(map(int, re.search(r"(\d+)\.(\d+)", ran).groups())) < OLDEST_CMAKE
    return ["cmake>=3.24"] * old + ["ninja"] * (shutil.which("ninja") is None)


def compile_library() -> tuple[Path, dict]:
    """Runs CMake in a folder for each list of architectures, which keeps the objects -> the library, and what build.json says."""
    import fcntl  # where there is nvcc for Linux

    torch, nvcc, ninja = find_torch(), find_nvcc(), shutil.which("ninja")
    if missing_tools():
        raise SystemExit(f"The CUDA kernels need {' and '.join(missing_tools())} to be compiled: pip install them, or set PERFUSION_CUDA=0")
    folder = ROOT / "build" / "cuda" / (re.sub(r"[^\w.+]+", "_", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) or "default")
    definitions = {
        "CMAKE_BUILD_TYPE": "Release", "CMAKE_MAKE_PROGRAM": ninja, "CMAKE_CUDA_COMPILER": nvcc, "PERFUSION_TORCH": torch,
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON", "Python3_EXECUTABLE": sys.executable,
        "PERFUSION_MANYLINUX": "ON" if os.environ.get("PERFUSION_MANYLINUX") == "1" else "OFF",
    }  # fmt: skip
    configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *(f"-D{name}={value}" for name, value in definitions.items())]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would write into each other's objects
        for command in (configure, ["cmake", "--build", folder, "--target", "perfusion_kernels_torch", "--parallel", jobs]):
            subprocess.run(command, check=True, pass_fds=(lock.fileno(),))  # held by a build that outlives this process, too
    release = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    versions = {"cuda": re.search(r"release ([\d.]+)", release)[1], "torch": ".".join(map(str, _version(torch / "version.py")))}
    return folder / LIBRARY, {**versions, "architectures": architectures(folder), "sources": digest_of_sources()}


def digest_of_sources() -> str:
    """Of all that is compiled and of how: 16 hexadecimal digits."""
    folder = ROOT / "csrc"
    files = [ROOT / "CMakeLists.txt", *(path for path in folder.rglob("*") if path.is_file() and "example" not in path.parts)]
    found = hashlib.sha256()
    for path in sorted(files):
        found.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def is_current(folder: Path) -> bool:
    """Whether the library in `folder` is of these sources and has code for all of TORCH_CUDA_ARCH_LIST."""
    try:
        content = json.loads((folder / "build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    wanted = re.findall(r"(\d+)\.(\d+[af]?)", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    held = content.get("architectures", [])
    return (folder / LIBRARY).exists() and content.get("sources") == digest_of_sources() and all(f"sm_{a}{b}" in held for a, b in wanted)


def architectures(folder: Path) -> list[str]:
    """What the library of a build folder holds code for: sm_80 is machine code, compute_80 is PTX, which the driver can compile for newer
    chips."""
    commands = json.loads((folder / "compile_commands.json").read_text())
    nvcc = next(each["command"] for each in commands if each["file"].endswith(".cu"))
    return [code for codes in re.findall(r"code=\[([^\]]*)\]", nvcc) for code in codes.split(",")]


class BuildCuda(Command):
    """A step of `build`: the library and build.json, into the package."""

    user_options = [("inplace", "i", "into the source tree, unless the library there is of these sources and architectures")]
    boolean_options = ["inplace"]
    editable_mode = False

    def initialize_options(self):
        self.build_lib, self.inplace = None, False

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        target = (ROOT if self.editable_mode or self.inplace else Path(self.build_lib)) / "perfusion_kernels" / "cuda"
        if self.inplace and is_current(target):
            print(f"perfusion-kernels: {target / LIBRARY} is of these sources")
            return
        target.mkdir(parents=True, exist_ok=True)
        (target / LIBRARY).unlink(missing_ok=True)  # of an earlier build
        reason = why_not()
        if reason:
            print(f"perfusion-kernels: without CUDA kernels; {reason}")
            content = {"reason": reason}
        else:
            library, content = compile_library()
            shutil.copy2(library, target / LIBRARY)
            print(f"perfusion-kernels: CUDA kernels for {', '.join(content['architectures'])}")
        (target / "build.json").write_text(json.dumps(content) + "\n", encoding="utf-8")

    def get_source_files(self):
        return []

    def get_outputs(self):
        names = ["build.json"] if why_not() else [LIBRARY, "build.json"]
        return [str(Path(self.build_lib, "perfusion_kernels", "cuda", name)) for name in names]

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    def get_tag(self):
        """The library has no symbol of Python's: with it a wheel is bound to the platform alone."""
        return ("py3", "none", super().get_tag()[2])


class PerfusionKernels(Distribution):
    def has_ext_modules(self):
        return why_not() is None


if __name__ == "__main__":
    build.sub_commands.append(("build_cuda", None))
    setup(
        distclass=PerfusionKernels,
        cmdclass={"build_cuda": BuildCuda, "bdist_wheel": Wheel},
        setup_requires=missing_tools() if "egg_info" in sys.argv and why_not() is None else [],
    )
