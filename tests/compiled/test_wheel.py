"""The wheel that is given away: built, repaired and checked by the tools that everybody uses, installed in a clean environment, loaded there.

For all architectures, from the objects that test_torch_library.py compiles too. PERFUSION_WHEEL_ARCHITECTURES=9.0 compiles one, which shows all but
the wheel's final size. PERFUSION_WHEEL=FILE tests a wheel that has been built already, without nvcc.
"""

import email
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PLATFORM = "manylinux_2_28_x86_64"
LIBRARY = "perfusion_kernels/cuda/libperfusion_kernels_torch.so"
LARGEST = 40 * 2**20
pytestmark = pytest.mark.skipif(
    "PERFUSION_WHEEL" not in os.environ
    and not (shutil.which("nvcc") and shutil.which("patchelf") and all(map(importlib.util.find_spec, ("build", "auditwheel")))),
    reason="a wheel takes nvcc, build, auditwheel and patchelf",
)

LOAD = """
import json, sys
import torch
torch.version.cuda = torch.version.cuda or "13.0"
import perfusion_kernels
from perfusion_kernels import cuda
from perfusion_kernels.cuda import library
found = library.compiled_kernels()
import perfusion
print(json.dumps({
    "where": [perfusion_kernels.__file__, perfusion.__file__], "not loaded": library.why_not_loaded(), "architectures": found["architectures"],
    "kernels": sorted({kernel["kernel"] for kernel in found["kernels"]}), "version": perfusion.__version__, "path": sys.path,
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if "PERFUSION_WHEEL" in os.environ:
        return Path(os.environ["PERFUSION_WHEEL"]).resolve(strict=True)
    folder = tmp_path_factory.mktemp("wheel")
    environment = {**os.environ, "PYTHON": sys.executable, "TORCH_CUDA_ARCH_LIST": os.environ.get("PERFUSION_WHEEL_ARCHITECTURES", "")}
    ran = subprocess.run([ROOT / ".ci/wheel", folder], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    (found,) = folder.glob("*.whl")
    return found


def test_its_name_says_where_it_runs(wheel):
    assert re.fullmatch(rf"perfusion_kernels-[\d.]+-py3-none-{PLATFORM}\.whl", wheel.name)


def test_it_is_small_and_brings_no_library_of_others(wheel):
    assert wheel.stat().st_size <= LARGEST
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert [name for name in names if ".so" in Path(name).name] == [LIBRARY]
        metadata = email.message_from_bytes(archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))))
        assert archive.getinfo(LIBRARY).file_size <= LARGEST
    assert metadata["Name"] == "perfusion-kernels" and any(line.startswith("torch>=") for line in metadata.get_all("Requires-Dist"))
    assert {name.split("/")[0] for name in names} == {"perfusion", "perfusion_kernels", f"perfusion_kernels-{metadata['Version']}.dist-info"}


def test_it_loads_in_a_clean_environment(wheel, tmp_path):
    """Installed by pip; torch and what else it requires are those of this environment, behind the wheel's own packages."""
    venv.create(tmp_path / "clean", with_pip=True)
    python = tmp_path / "clean/bin/python"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PERFUSION", "TRITON"))}
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel], check=True, cwd=tmp_path, env=clean)
    (packages,) = (tmp_path / "clean/lib").glob("python*/site-packages")
    others = dict.fromkeys(str(Path(module.__file__).parents[1]) for module in (torch, pytest))
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in others))
    ran = subprocess.run([python, "-c", LOAD], capture_output=True, text=True, cwd=tmp_path, env=clean)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert all(Path(where).is_relative_to(packages) for where in found["where"]) and str(ROOT) not in found["path"]
    assert found["not loaded"] is None and found["architectures"] and "edited_attention" in found["kernels"]
    ran = subprocess.run([tmp_path / "clean/bin/perfusion", "--version"], capture_output=True, text=True, cwd=tmp_path, env=clean)
    assert ran.returncode == 0 and found["version"] in ran.stdout, ran.stderr
