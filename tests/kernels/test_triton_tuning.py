"""Choices of tile sizes: the first without a measurement, the fastest after one, and nothing measured unasked."""

import json

import pytest
import torch
from triton.runtime.errors import OutOfResources

from perfusion_kernels.triton import tuning

CPU = torch.device("cpu")
LIST = ({"BLOCK": 16}, {"BLOCK": 32}, {"BLOCK": 64})


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PERFUSION_CACHE", str(tmp_path / "cache"))
    tuning.known.cache_clear()
    yield tmp_path / "cache"
    tuning.known.cache_clear()


class Kernel:
    """Counts its launches; `times` by block size."""

    def __init__(self, **times):
        self.runs, self.times = [], times

    def launch(self, key=(77, torch.float16), configurations=LIST, **options):
        tuning.launch("kernel", key, CPU, configurations, self.run, **options)

    def run(self, configuration):
        self.runs.append(configuration["BLOCK"])

    def measure(self, call):
        call()
        return self.times[f"b{self.runs[-1]}"]


def test_the_first_is_taken_and_nothing_is_measured_or_written(folder):
    kernel = Kernel()
    kernel.launch()
    assert kernel.runs == [16] and not folder.exists()


def test_the_fastest_is_measured_once_kept_and_found_again(folder):
    kernel = Kernel(b16=3, b32=1, b64=2)
    with tuning.tuning(kernel.measure) as chosen:
        kernel.launch()
        kernel.launch()
    assert kernel.runs == [16, 32, 64, 32, 32]
    assert chosen == {"cpu": {"kernel 77 torch.float16": {"BLOCK": 32}}}
    assert [json.loads(file.read_text()) for file in folder.iterdir()] == [chosen["cpu"]]
    tuning.known.cache_clear()  # as another process begins
    kernel.launch()
    kernel.launch(key=(78, torch.float16))
    assert kernel.runs[5:] == [32, 16]


def test_measuring_again_chooses_again():
    kernel = Kernel(b16=3, b32=1, b64=2)
    with tuning.tuning(kernel.measure):
        kernel.launch()
    kernel.times = {"b16": 1, "b32": 3, "b64": 2}
    with tuning.tuning(kernel.measure) as chosen:
        kernel.launch()
    kernel.launch()
    assert kernel.runs[-1] == 16 and list(chosen["cpu"].values()) == [{"BLOCK": 16}]


def test_what_a_device_has_no_room_for_is_passed_over():
    kernel = Kernel(b32=2, b64=3)

    def measure(call):
        call()
        if kernel.runs[-1] == 16:
            raise OutOfResources(300_000, 200_000, "shared memory")
        return kernel.times[f"b{kernel.runs[-1]}"]

    with tuning.tuning(measure):
        kernel.launch()
    assert kernel.runs == [16, 32, 64, 32]


def test_a_trial_stands_for_what_may_run_once():
    kernel, tried = Kernel(), []
    with tuning.tuning(lambda call: call() or len(tried)):
        kernel.launch(trial=lambda configuration: tried.append(configuration["BLOCK"]))
    assert tried == [16, 32, 64] and kernel.runs == [16]


@pytest.mark.parametrize("text", ("", "[]", '{"kernel 77 torch.float16": {"BLOCK": 128}}', '{"kernel 77 torch.float16": 3}'))
def test_a_file_that_does_not_fit_is_passed_over(folder, text):
    folder.mkdir()
    tuning.path("cpu").write_text(text)
    kernel = Kernel()
    kernel.launch()
    assert kernel.runs == [16]


def test_a_failure_inside_keeps_what_was_chosen_and_stops_measuring():
    kernel = Kernel(b16=3, b32=1, b64=2)
    with pytest.raises(RuntimeError, match="stop"), tuning.tuning(kernel.measure):
        kernel.launch()
        raise RuntimeError("stop")
    kernel.launch(key=(1, torch.float16))
    kernel.launch()
    assert kernel.runs[-2:] == [16, 32]


@pytest.mark.numeric
def test_the_kernels_measure_and_keep_their_results_right(folder):
    """In place and not: with every configuration tried in turn the results stay what they are without."""
    from . import cases, plain
    from .tolerance import assert_close, exactly

    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = cases.make(B=2, T=3, D=5, J=2, H=2, d=2, device=device)
    for operator in ("concept_gates", "edited_projection"):
        arguments = case.arguments(operator)
        expected = cases.PUBLIC[operator](**arguments, backend="triton")
        order = iter(range(100, 0, -1))  # each is faster than the one before it
        with tuning.tuning(lambda call: call() or next(order)) as chosen:
            results = cases.PUBLIC[operator](**arguments, backend="triton")
        exact = exactly(getattr(plain, operator), *cases.positional(operator, case.double().arguments(operator)))
        for found in (expected, results):
            for result, truth in zip(found if isinstance(found, tuple) else (found,), exact, strict=True):
                assert_close(result, truth)
        assert len(chosen) == 1 and next(folder.iterdir()).name.startswith("triton-")
