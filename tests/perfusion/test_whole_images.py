"""Whole images on toybox through the kernels themselves, on the CPU: slots, strides, index, mixed rows, schedules, regions, prompt travel.

Triton's kernels run in its interpreter. The CUDA sources run compiled for the host, in a process where PERFUSION_CUDA_ON_HOST names the
library (tests/cuda_host/test_backend_on_host.py). Every step of the UNet, from the latents that the reference's run had there, against a UNet in float64
by the policy of tests/kernels/tolerance.py; then the pictures of a run of their own.
"""

import math

import pytest
import torch
from torch.utils._pytree import tree_map

import perfusion_kernels
from perfusion import Request
from perfusion.handle import attach
from perfusion.models import load_pipeline
from tests.kernels import cuda_on_host
from tests.kernels.tolerance import Exact, assert_no_worse
from tests.perfusion.editing import draw, make_concept

pytestmark = pytest.mark.proof
# each in the dtype that all of its kernels take
DTYPES = {"triton": torch.float32, "cuda": torch.float16}
BACKENDS = ["triton", *["cuda"] * cuda_on_host.registered()]
STEPS = 4  # of these the third and fourth of a prompt that travels are fused
LEFT = torch.zeros(64, 64)
LEFT[:, :32] = 1
# form -> prompts, settings of <teddy>, options of the pipeline. Rows with two concepts, with one and with none are in one batch.
CASES = {
    "slots": (["a <teddy> and a <teapot>", "a mug"], {}, dict(guidance_scale=3.0)),
    "schedule": (["a <teddy>", "a mug"], dict(bias=[0.2, 0.6], strength=lambda step: 1 - 0.2 * step), dict(guidance_scale=1.0)),
    "regions": (
        [Request("a <teddy> next to a <teapot>", regions={"teddy": LEFT, "teapot": 1 - LEFT}, gate="word"), "a mug"], {},
        dict(guidance_scale=1.0),
    ),
    "fused": (["a <teddy>", "a mug"], {}, dict(guidance_scale=1.0)),
}  # fmt: skip


@pytest.fixture
def pipe(name):
    return load_pipeline("toybox", device="cpu", dtype=DTYPES[name])


def travel(pipe, step, timestep, tensors):
    """Other encodings at every step, on a way that leads from one to another."""
    return {"prompt_embeds": tensors["prompt_embeds"] * (1 - 0.01 * step)}


def watched(pipe, calls, results):
    """Hooks that keep the arguments of every call of the UNet, and what it returned."""
    begin = pipe.unet.register_forward_pre_hook(lambda module, *arguments: calls.append(arguments), with_kwargs=True)
    return begin, pipe.unet.register_forward_hook(lambda module, arguments, output: results.append(output[0].clone()))


def again(pipe, calls, dtype):
    """The UNet's results for the arguments of another run, in another dtype. A tensor of several calls stays one."""
    known = {}

    def cast(leaf):
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point() or leaf.dtype == dtype:
            return leaf
        return known.setdefault(id(leaf), leaf.to(dtype))

    with torch.no_grad():
        return [pipe.unet(*tree_map(cast, args), **tree_map(cast, options))[0] for args, options in calls]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BACKENDS)
def test_pictures_are_those_of_the_reference(name, case, pipe):
    prompts, settings, options = CASES[case]
    options = dict(num_inference_steps=STEPS, output_type="pt", **options)
    if case == "fused":
        options |= dict(callback_on_step_end=travel, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    form = case if case in ("schedule", "fused") else "slots"
    calls, plain = [], []
    with attach(pipe) as handle:
        engine = handle._engine
        handle.load(make_concept(handle.base, "teddy"))
        handle.load(make_concept(handle.base, "teapot", seed=2))
        if settings:
            handle.set("teddy", **settings)
        engine.by_index = True  # as on a device
        with perfusion_kernels.use_backend("reference"):
            hooks = watched(pipe, calls, plain)
            expected = draw(pipe, prompts, **options)
            for hook in hooks:
                hook.remove()
            assert engine.form == form and len(calls) == STEPS
            pipe.to(torch.float64)
            truth = again(pipe, calls, torch.float64)
            pipe.to(DTYPES[name])  # the bits that it had
        engine.forget(), engine.begin_run()
        with perfusion_kernels.use_backend(name):
            own = again(pipe, calls, DTYPES[name])
            assert engine.form == form
            engine.forget()
            found = draw(pipe, prompts, **options)
            assert engine.form == form
    rows = torch.arange(len(own[0]))[:, None]  # each alone, and all of them
    for mine, same, exact in zip(own, plain, truth, strict=True):
        assert_no_worse(mine, same, Exact(exact, exact.abs()), rows)
    psnr = -10 * math.log10(max((expected.double() - found.double()).square().mean().item(), 1e-12))
    print(f"{name}, {case}: {psnr:.0f} dB")
    assert psnr > (60 if DTYPES[name] == torch.float32 else 40)
