"""The library that an installation compiles, by nvcc for all architectures; it loads without a GPU, and all but a launch can be seen."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from bench.kernels import nvcc_matrix
from perfusion_kernels.cuda import OPERATORS, library

from ..cuda_host.build import ROOT

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "compute_100", "sm_120")

SCRIPT = """
import importlib, json, sys
from pathlib import Path
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import perfusion_kernels
from perfusion_kernels import backend, cuda
from perfusion_kernels.cuda import library
from perfusion.cli import doctor

library.LIBRARY = Path(sys.argv[1])
library.note = lambda: json.loads(sys.argv[2])
torch.version.cuda = torch.version.cuda or "13.0"
if not any("cuda" in have for have in backend._implementations.values()):
    cuda.register_all()
facts = {"compiled": library.compiled_kernels(), "doctor": [str(finding) for finding in doctor._compiled()]}
facts |= {"not loaded": library.why_not_loaded(), "unavailable": library.unavailable()}
facts["kernels"] = [n for n in cuda.OPERATORS if torch._C._dispatch_has_kernel_for_dispatch_key(f"perfusion_kernels::{n}.cuda", "CUDA")]
library.why_not_on, library.shared_memory = lambda device: None, lambda device: 101376

q, table, index = torch.zeros(2, 5, 2, 32, dtype=torch.half), torch.zeros(3, 64), torch.zeros(2, 1, dtype=torch.int32)
gates = torch.zeros(2, 5, 1)
edit = dict(gates=gates, components=gates, index=index, key_outputs=table, key_targets=table)
with FakeTensorMode() as mode:
    on_gpu = {name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in dict(query=q, key=q, value=q, **edit).items()}
result = perfusion_kernels.edited_attention(**on_gpu)
facts["fake"] = [str(result.device), list(result.shape), str(result.dtype)]
try:
    torch.ops.perfusion_kernels.edited_attention.cuda(q, q, q, *[None] * 10, 0.3)
except NotImplementedError as error:
    facts["on the host"] = str(error)
library.SCHEMAS["concept_gates"] = library.SCHEMAS["concept_gates"].replace("Tensor index", "Tensor? index")
library.why_not_loaded.cache_clear()
facts["another schema"] = library.why_not_loaded()
print(json.dumps(facts))
"""


def setup_script():
    spec = importlib.util.spec_from_file_location("perfusion_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        patch.setenv("MAX_JOBS", "2")
        return setup_script().compile_library()


@pytest.fixture(scope="module")
def facts(compiled):
    path, content = compiled
    command = [sys.executable, "-c", SCRIPT, path, json.dumps(content)]
    ran = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_it_loads_and_registers_without_a_gpu(facts):
    assert facts["not loaded"] is None
    assert facts["kernels"] == list(OPERATORS)
    assert facts["fake"] == ["cuda:0", [2, 5, 2, 32], "torch.float16"]
    assert facts["on the host"] == "perfusion_kernels::edited_attention.cuda has no compiled kernel for tensors on cpu"
    schema = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor?, Tensor?) -> (Tensor, Tensor)"
    assert f"another version: its concept_gates is {schema}, here it is (Tensor, Tensor, Tensor, Tensor?," in facts["another schema"]


def test_the_architectures_are_those_that_the_documents_list(compiled):
    """By default; read from the library itself. Machine code for each chip that differs, and PTX for all later ones."""
    path, content = compiled
    files = {
        kind: subprocess.run([nvcc_matrix.cuobjdump(), f"--list-{kind}", path], capture_output=True, text=True, check=True).stdout
        for kind in ("elf", "ptx")
    }
    found = {f"sm_{each}" for each in re.findall(r"\.sm_(\w+)\.cubin", files["elf"])}
    found |= {f"compute_{each}" for each in re.findall(r"\.sm_(\w+)\.ptx", files["ptx"])}
    assert found == set(content["architectures"]) == set(ARCHITECTURES)
    everywhere = "8.0 8.6 8.9 9.0 10.0+PTX 12.0"
    assert f"set(list {everywhere})" in (ROOT / "CMakeLists.txt").read_text()
    for file in ("setup.py", "docs/kernels-cuda.md"):
        assert everywhere.replace(" ", ";") in (ROOT / file).read_text(), file
    assert tuple(each.replace("+PTX", "") for each in everywhere.split()) == nvcc_matrix.ARCHITECTURES
    for capability in ((8, 0), (8, 7), (9, 0), (10, 3), (11, 0), (12, 1), (13, 0)):
        assert library.runs_on(content["architectures"], *capability)


def test_the_library_lists_its_kernels_and_the_doctor_sums_them_up(facts, compiled):
    """Row by row, test_registry.py looks at them."""
    found = dict(facts["compiled"])
    kernels = found.pop("kernels")
    assert found == compiled[1]
    shared_memory = {(row["kernel"], row["tile"]): row["dynamic_shared_memory"] for row in kernels}
    assert shared_memory["edited_attention", "head_dim 40, keys 80, query_rows 16"] == 23040 and shared_memory["concept_gates", "resident 1"] is None  # by J
    registers = sorted(row["registers"] for row in kernels)
    spilling = sum(row["spills"] + row["stack"] > 0 for row in kernels)  # of contexts that do not fit there: see test_nvcc.py
    assert facts["doctor"] == [
        f"ok  compiled  cuda                    {len(kernels)} kernels for {', '.join(ARCHITECTURES)} by CUDA {found['cuda']},"
        f" {registers[0]} to {registers[-1]} registers, {spilling or 'none'} with spills,"
        " up to 210 KiB of shared memory (fused_edited_attention, head_dim 160, keys 256)"
    ]


def test_one_binary_for_every_python_and_every_later_torch(compiled):
    """Of Python it needs no symbol, of torch those of the stable ABI, all of them in the list of 2.10; of libtorch_cuda one, weakly."""
    path, _ = compiled
    symbols = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout.splitlines()
    weak = {line.split()[-1] for line in symbols if line.split()[-2] == "w"}
    needed = {line.split()[-1].split("@")[0] for line in symbols} - weak
    foreign = r"_?Py|_ZNK?(2at|3c10|5torch)"  # C++ of torch, and Python
    assert [name for name in needed if re.match(foreign, name)] == [] and "aoti_torch_get_current_cuda_stream" in weak
    assert any(name.startswith("torch_library_impl") for name in needed)
    dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert all(f"[{name}]" in dynamic for name in ("libtorch.so", "libtorch_cpu.so", "libc10.so"))
    assert "libcudart" not in dynamic and "libpython" not in dynamic and "PATH" not in dynamic


@pytest.mark.parametrize("wrong", ("Ampere", "80", "8.0+ptx"))
def test_architectures_are_written_as_torch_writes_them(tmp_path, monkeypatch, wrong):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0 {wrong}")
    ran = subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path], capture_output=True, text=True)
    assert ran.returncode and "TORCH_CUDA_ARCH_LIST must list compute capabilities as 8.0;9.0;10.0+PTX" in " ".join(ran.stderr.split())
