"""What `make bench-regression` times, by pytest-benchmark: every operator, a personalised step, loading and swapping a concept.

The first case is the yardstick, a product of matrices: results are told as ratios to it, never as times (bench/regression.py).
"""

import itertools

import pytest
import torch

from perfusion.base import describe_base
from perfusion.handle import attach
from tests.kernels import cases
from tests.perfusion.editing import make_concept
from tests.perfusion.tiny import tiny_sd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPE = dict(B=2, T=77, D=768, J=2, S=6, H=8, d=40, N=256)


def finished(call):
    """`call`, and the wait for the device."""

    def run():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def test_yardstick(benchmark):
    x = torch.randn(512, 512, device=DEVICE, dtype=DTYPE)
    benchmark(finished(lambda: x @ x))


@pytest.mark.parametrize("operator", cases.PUBLIC)
def test_operator(benchmark, operator):
    arguments = cases.make(**SHAPE, dtype=DTYPE, device=DEVICE, full=True).arguments(operator)
    call = cases.PUBLIC[operator]
    with torch.no_grad():
        benchmark(finished(lambda: call(**arguments)))


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd().to(DEVICE)


@pytest.fixture(scope="module")
def concept(pipe, tmp_path_factory):
    """A concept, and the file that it is saved in."""
    file = tmp_path_factory.mktemp("concepts") / "teddy.safetensors"
    made = make_concept(describe_base(pipe), "teddy")
    made.save(file)
    return made, file


def test_personalised_step(benchmark, pipe, concept):
    """A forward of the UNet with a concept in the prompt, for a prompt that is known already."""
    with attach(pipe) as handle, torch.no_grad():
        handle.load(concept[0])
        encodings = pipe.encode_prompt("a photo of a <teddy>", DEVICE, 1, False)[0]
        side = pipe.unet.config.sample_size
        latents, time = torch.randn(1, 4, side, side, device=DEVICE), torch.tensor(10, device=DEVICE)
        benchmark(finished(lambda: pipe.unet(latents, time, encoder_hidden_states=encodings)))


def test_load(benchmark, pipe, concept):
    """From the file into the bank, under a name of its own, and out again."""
    names = itertools.count()
    with attach(pipe) as handle:
        benchmark(finished(lambda: handle.unload(handle.load(concept[1], name=f"teddy{next(names)}"))))


def test_swap(benchmark, pipe, concept):
    """One resident concept for another that is in memory already."""
    with attach(pipe) as handle:
        handle.load(concept[0])

        def swap():
            handle.unload("teddy")
            handle.load(concept[0])

        benchmark(finished(swap))
