"""Whole images on toybox through the kernels themselves, on the CPU: slots, strides, index, mixed rows, schedules, regions.

Triton's kernels run in its interpreter. The CUDA sources run compiled for the host, where PERFUSION_CUDA_ON_HOST names the library
(tests/kernels/cuda_on_host.py). Against the default of a CPU: a step from equal latents, and the pictures.
"""

import math

import pytest
import torch

import perfusion_kernels
from perfusion import Request
from perfusion.handle import attach
from perfusion.models import load_pipeline
from tests.kernels import cuda_on_host
from tests.perfusion.editing import draw, make_concept

pytestmark = pytest.mark.proof
BACKENDS = ["triton", pytest.param("cuda", marks=pytest.mark.skipif(not cuda_on_host.registered(), reason="PERFUSION_CUDA_ON_HOST is not set"))]
LEFT = torch.zeros(64, 64)
LEFT[:, :32] = 1
PROMPTS = {
    "slots": (["a <teddy> and a <teapot>", "a mug", "a <teapot|bias=0.1>"], {}),
    "schedule": (["a <teddy>", "a mug"], dict(bias=[0.2, 0.6])),
    "regions": ([Request("a <teddy> next to a <teapot>", regions={"teddy": LEFT, "teapot": 1 - LEFT}, gate="word"), "a mug"], {}),
}


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("toybox", device="cpu")


@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("name", BACKENDS)
def test_pictures_are_those_of_the_reference(name, case, pipe):
    prompts, settings = PROMPTS[case]
    options = dict(num_inference_steps=2, output_type="pt", guidance_scale=1.0 if case != "slots" else 3.0)
    steps = {"default": [], name: []}
    with attach(pipe) as handle:
        handle.load(make_concept(handle.base, "teddy"))
        handle.load(make_concept(handle.base, "teapot", seed=2))
        if settings:
            handle.set("teddy", **settings)
        handle._engine.by_index = True  # as on a device

        def record(which):
            return lambda module, args, output: steps[which].append(output[0].clone())

        watching = pipe.unet.register_forward_hook(record("default"))
        expected = draw(pipe, prompts, **options)
        form = handle._engine.form
        watching.remove()
        handle._engine.forget()
        watching = pipe.unet.register_forward_hook(record(name))
        with perfusion_kernels.use_backend(name):
            found = draw(pipe, prompts, **options)
        watching.remove()
        assert handle._engine.form == form == ("schedule" if case == "schedule" else "slots")
    first, other = steps["default"][0], steps[name][0]  # from equal latents
    for row in range(len(first)):
        assert (first[row] - other[row]).norm() < 1e-4 * first[row].norm()
    psnr = -10 * math.log10(max((expected - found).square().mean().item(), 1e-12))
    assert psnr > 50
