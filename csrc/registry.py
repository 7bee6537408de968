"""Which kernels a build folder of CMake holds, as JSON: for what architectures, and what each takes of the chip.

    python csrc/registry.py build/cuda/FOLDER

The compile commands say the architectures, and ptxas, whose words keep_ptxas.sh keeps beside the objects, the rest. A kernel's
template arguments are its element type and its tile.
"""

import json
import re
import subprocess
import sys
from pathlib import Path


def architectures(folder: Path) -> list[str]:
    """What the library holds code for: sm_80 is machine code, compute_80 is PTX, which the driver can compile for newer chips."""
    commands = json.loads((folder / "compile_commands.json").read_text())
    nvcc = next(each["command"] for each in commands if each["file"].endswith(".cu"))
    return [code for codes in re.findall(r"code=\[([^\]]*)\]", nvcc) for code in codes.split(",")]


def kernels(folder: Path) -> list[dict]:
    """One row for each kernel and architecture; bytes of spills are those stored and loaded, of stack those of local memory."""
    rows = []
    for file in sorted(folder.rglob("*.ptxas")):
        for part in file.read_text().split("Compiling entry function ")[1:]:
            symbol, arch = re.match(r"'(\S+)' for '(\w+)'", part).groups()
            stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups())
            registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
            row = dict(architecture=arch, registers=int(registers[1]), spills=stores + loads, stack=stack)
            rows.append(dict(kernel=symbol, **row, shared=int(shared[1]) if shared else 0))
    names = demangled([row["kernel"] for row in rows])
    return sorted(({**row, "kernel": name} for row, name in zip(rows, names)), key=lambda row: (row["kernel"], row["architecture"]))


def demangled(symbols: list[str]) -> list[str]:
    """edited_attention_kernel<Half, 40, 5> for each symbol."""
    lines = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"^void |perfusion::|\(.*", "", line) for line in lines]


if __name__ == "__main__":
    build = Path(sys.argv[1])
    print(json.dumps({"architectures": architectures(build), "kernels": kernels(build)}))
