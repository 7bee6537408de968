"""What kernels note on the device reaches whoever draws: a slot that is out of range in the tensors that the layers read."""

import pytest
import torch

import perfusion_kernels
from perfusion.handle import attach
from tests.kernels import cuda_on_host
from tests.perfusion.editing import draw, make_concept
from tests.perfusion.tiny import SMALL, tiny_sd

PROMPT = "a photo of a <teddy> on a beach"
BACKENDS = ["triton", *["cuda"] * cuda_on_host.registered()]  # compiled: of tests/cuda_host/test_backend_on_host.py
TOLD = r"^What was drawn last may be wrong.*edited_attention.*kernels on cpu .*slots: a row named a slot.*validate.*draw again"


@pytest.fixture
def noted(monkeypatch):
    """Stands in for check_device: what is in the list is told once, as kernels note it. `asked`: how often it was asked, and how."""
    noted, asked = [], []

    def check_device(device, *, synchronize=True):
        asked.append((str(device), synchronize))
        if noted:
            kind = noted.pop()
            raise RuntimeError(f"kernels on {device} were given values out of range: {kind}. Call with validate=True to find the call")

    check_device.asked, check_device.noted = asked, noted
    monkeypatch.setattr(perfusion_kernels, "check_device", check_device)
    return check_device


def meets(pipe, noted, step):
    """A bad slot is met in a step of the next call."""

    def callback(pipe, index, time, kwargs):
        if index == step:
            noted.noted.append("slots: a row named a slot outside of key and value; it gave zeros")
        return kwargs

    return callback


@pytest.mark.parametrize("step, forwards", [(0, 1), (3, 4)], ids=["before the next forward", "at the end of the call"])
def test_an_error_is_told_in_the_call_that_met_it_and_loses_nothing(handle, pipe, noted, step, forwards):
    expected, counts = draw(pipe, PROMPT, num_inference_steps=4), dict(handle._engine.counts)
    noted.asked.clear()
    with pytest.raises(RuntimeError, match=TOLD):
        draw(pipe, PROMPT, num_inference_steps=4, callback_on_step_end=meets(pipe, noted, step))
    assert handle._engine.counts["slots"] - counts["slots"] == forwards
    assert set(noted.asked) == {("cpu", False)}  # nothing waits
    assert set(handle.concepts()) == {"teddy", "teapot"} and torch.equal(draw(pipe, PROMPT, num_inference_steps=4), expected)


def test_it_is_told_once_and_not_after_detach(pipe, noted):
    with attach(pipe) as handle:
        handle.load(make_concept(handle.base, "teddy"))
        draw(pipe, PROMPT)
        noted.noted.append("slots: …")
        with pytest.raises(RuntimeError, match="What was drawn last"):
            draw(pipe, "a cat")  # without a concept
        draw(pipe, "a cat")
    noted.noted.append("slots: …")
    draw(pipe, "a cat")
    assert noted.noted and "maybe_free_model_hooks" not in vars(pipe)


def test_without_a_concept_nothing_is_asked(pipe, noted):
    with attach(pipe):
        draw(pipe, "a cat")
    assert not noted.asked


def test_a_compiled_unet_is_one_graph(noted):
    """The check is outside of it: fullgraph, and told all the same."""
    torch._dynamo.reset()
    pipe = tiny_sd(unet=SMALL)
    with attach(pipe) as handle, torch.no_grad():
        handle.load(make_concept(handle.base, "teddy"))
        pipe.unet.compile(backend="eager", fullgraph=True)
        draw(pipe, PROMPT)
        with pytest.raises(RuntimeError, match=TOLD):
            draw(pipe, PROMPT, callback_on_step_end=meets(pipe, noted, 0))
        draw(pipe, PROMPT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_that_is_out_of_range_is_told_by_the_handle(backend):
    """Kernels read nothing for it, note it, and the pipeline's call raises."""
    pipe = tiny_sd(unet={**SMALL, "block_out_channels": (64,)}).to(torch.bfloat16)  # heads of 32 columns

    def break_slots(pipe, index, time, kwargs):
        handle._engine.state.slots.data[0] = 2**31 - 1  # `.data`, or the check of values in host memory would see it first
        return kwargs

    with attach(pipe) as handle, perfusion_kernels.use_backend(backend):
        handle._engine.fast_path.by_index = True  # as on a device
        handle.load(make_concept(handle.base, "teddy"))
        expected = draw(pipe, PROMPT)
        with pytest.raises(RuntimeError, match=TOLD):
            draw(pipe, PROMPT, callback_on_step_end=break_slots)
        assert torch.equal(draw(pipe, PROMPT), expected)
