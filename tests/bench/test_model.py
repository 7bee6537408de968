"""bench/model.py: what it counts is counted right, and assumptions move what they should."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import model, rows
from bench.suites import storage
from perfusion_kernels import ConceptBank

pytestmark = pytest.mark.bench

ROOT = Path(__file__).parents[2]
A = model.Assumptions()
VIEWS = ("view", "reshape", "expand", "permute", "transpose", "slice", "split", "chunk", "unsqueeze", "squeeze", "detach", "alias", "select", "t")


INSIDE = ("bmm.default", "mul.Scalar")  # of an attention that the meta device spells out; its softmax counts for the one kernel


class Launches(TorchDispatchMode):
    """Counts operators that start a kernel: all but views and allocations, and an attention as one."""

    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        name = operation.__name__.split(".")[0]
        free = name.strip("_") in VIEWS or name.startswith(("empty", "_unsafe_view", "unsafe_split", "as_strided"))
        self.count += not free and operation.__name__ not in INSIDE
        return operation(*arguments, **(keywords or {}))


def test_flops_and_launches_of_a_unet():
    """Of SD 1.5, with tensors that have no values: FLOPs within 1 %, launches within 10 %, which differ by version of diffusers."""
    unet = storage.unet("sd15").eval()
    meta = dict(device="meta")
    arguments = torch.empty(1, 4, 64, 64, **meta), torch.empty(1, **meta), torch.empty(1, 77, 768, **meta)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        unet(*arguments)
    with torch.no_grad(), Launches() as launches:
        unet(*arguments)
    assert flops.get_total_flops() == pytest.approx(model.UNETS["sd15"].flops, rel=0.01)
    assert launches.count == pytest.approx(model.UNETS["sd15"].launches, rel=0.1)


def test_bytes_of_a_concept_are_those_of_the_bank():
    for name in model.roofline.UNETS:
        outputs = sum(layer.count * layer.C for layer in model.roofline.UNETS[name])
        bank = ConceptBank(3, model.roofline.TEXT_WIDTHS[name], outputs, dtype=torch.float16)
        held = sum(table.nbytes for table in vars(bank).values() if isinstance(table, torch.Tensor))
        assert held == 3 * model.concept_bytes(name)


def test_bytes_of_a_lora_are_those_that_were_written():
    for row in rows.read(ROOT / "bench/results/storage.jsonl"):
        if row["provider"] == "LoRA, rank 16":
            assert row["file_bytes"] == model.UNETS[row["case"]].lora_bytes


@pytest.mark.parametrize("name", model.roofline.UNETS)
def test_what_follows_from_what(name):
    def step(a=A, rows=2, **options):
        return model.step_seconds(name, rows, a, **options)

    assert step(graph=True) <= step(graph=False) and step(graph=True) < step(graph=True, ours=False)
    assert step(graph=True, rows=4) > step(graph=True) > step(graph=True, rows=1)
    saved = A.stock_layer_launches - A.layer_launches
    slow = dataclasses.replace(A, host_launch=1.0)  # the host alone counts, and we launch less
    assert step(slow, graph=False) == pytest.approx(model.UNETS[name].launches - saved * model.layers(name))
    assert step(graph=True, a=slow) == step(graph=True)
    mixed = [step(rows=2 * n, graph=False, ours=False, adapters=n) / step(rows=2 * n, graph=False) for n in (1, 16)]
    assert 1 < mixed[0] < mixed[1]
    half = dataclasses.replace(A, memory=A.memory / 2)
    assert 0 < model.resident_concepts(name, half) < model.resident_concepts(name, A) / 2
    assert model.resident_concepts(name, dataclasses.replace(A, memory=1e9)) == 0
    assert model.miss_seconds(name, A, on_disk=False) < model.miss_seconds(name, A, on_disk=True) < model.lora_seconds(name, A)


@pytest.mark.smoke
def test_the_saved_predictions_are_those_of_today():
    saved = rows.read(ROOT / "bench/results/model.jsonl")
    assert saved == [{**row, "assumptions": saved[0]["assumptions"]} for row in model.predictions(A)], "python bench/model.py --out ..."
    assert saved[0]["assumptions"].keys() == {field.name for field in dataclasses.fields(A)}


def test_the_command_takes_other_assumptions():
    command = [sys.executable, ROOT / "bench/model.py"]
    first, second = (subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout for more in ([], ["--gpus", "4"]))
    assert first == model.table(list(model.predictions(A))) + "\n"
    changed = [line.split("|")[1].strip() for line, other in zip(first.splitlines(), second.splitlines()) if line != other]
    assert changed == ["images, a node", "images, a fleet"]


def test_launches_that_are_assumed_were_counted():
    """By the suite `static`: of the stock step, and what ours saves and others add, to the launch."""
    counted = {(row["case"], row["provider"]): row["value"] for row in rows.read(ROOT / "bench/results/static.jsonl") if row.get("unit") == "launches"
               and row["gate"] == "counted"}  # fmt: skip
    models = {case for case, _ in counted} & set(model.UNETS)
    assert models >= {"sd15", "sdxl"}
    for name in models:
        layers, stock = model.layers(name), counted[name, "stock"]
        assert stock == pytest.approx(model.UNETS[name].launches, rel=0.01)
        assert stock - counted[name, "perfusion"] == layers * (A.stock_layer_launches - A.layer_launches)
        assert counted[name, "LoRA"] - stock == A.unfused_launches * dict(A.lora_layers)[name]
        assert counted[name, "gated edit"] - stock == 2 * layers * A.gated_launches
        assert counted[name, "PEFT mixed batch, 16"] - stock == pytest.approx(16 * A.adapter_launches * dict(A.lora_layers)[name], rel=0.01)
