"""What every test may rely on."""

import os
import signal
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]

# Without a GPU, Triton's kernels are executed by its interpreter, which has to be said before Triton is imported
if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "Triton was imported before its interpreter could be asked for"
    os.environ["TRITON_INTERPRET"] = "1"

if "PERFUSION_CUDA_ON_HOST" in os.environ:
    from .kernels import cuda_on_host  # which imports Triton

    cuda_on_host.register()


def pytest_configure() -> None:
    # a shell's background job starts with SIGINT ignored, and Python then leaves Ctrl-C ignored, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):  # nohup has it ignored
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # programs that tests start find the packages where the tests find them
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
