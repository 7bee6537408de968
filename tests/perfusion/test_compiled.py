"""A compiled UNet: one graph for each form, whatever prompts, concepts and settings are. All of them are data."""

import itertools
import random

import pytest
import torch
from torch._dynamo.utils import counters

from perfusion import Request
from perfusion.attention_processor import FUSED, SCHEDULE, SLOTS, STOCK
from perfusion.handle import attach
from tests.perfusion.editing import make_concept
from tests.perfusion.tiny import SMALL, tiny_sd

pytestmark = pytest.mark.pipelines

COUNT = 100
NAMES = ("teddy", "teapot", "robot", "kettle", "vase")
SCENES = ("on a beach", "in the snow", "and a red cube", "at night", "in the kitchen")


def requests(form):
    """Different prompts, with sets of one to five concepts, and different settings."""
    numbers = random.Random(0)
    sets = itertools.cycle(each for count in range(1, 6) for each in itertools.islice(itertools.permutations(NAMES, count), 5))
    for number in range(COUNT):
        if form == STOCK:
            yield f"a cat {number}"
            continue
        words = [f"a <{name}:{numbers.uniform(0.1, 1.5):.2f}>" for name in next(sets)]
        biases = [numbers.uniform(-0.5, 1.0) for _ in range(2)]
        yield Request(
            " and ".join([*words, numbers.choice(SCENES)]), bias=biases if form == SCHEDULE else biases[0],
            temperature=numbers.uniform(0.1, 1.0), gate=numbers.choice(("word", "similarity")),
        )  # fmt: skip


COMPILED = {
    "the UNet": lambda unet: unet.compile(backend="eager", fullgraph=True),
    "its repeated blocks": lambda unet: unet.compile_repeated_blocks(backend="eager", fullgraph=True),  # of equal shape here
}


@pytest.mark.parametrize("attached", ["before", "after"])
@pytest.mark.parametrize("compiled", COMPILED)
def test_a_graph_of_each_form_serves_a_hundred_prompts_concepts_and_settings(compiled, attached):
    torch._dynamo.reset()
    pipe = tiny_sd(unet=SMALL)
    if attached == "after":
        COMPILED[compiled](pipe.unet)
    with attach(pipe, capacity=len(NAMES)) as handle, torch.no_grad():
        for seed, name in enumerate(NAMES):
            handle.load(make_concept(handle.base, name, seed=seed))
        if attached == "before":
            COMPILED[compiled](pipe.unet)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for form in (STOCK, SLOTS, SCHEDULE, FUSED):
            counters.clear()
            handle._engine.counts[form], found = 0, set()
            for row in pipe.encode_prompt(list(requests(form)), "cpu", 1, False)[0]:
                if form == FUSED:  # the encodings of one run are new at every step
                    handle._engine._run.changed = 10
                else:
                    handle._engine.begin_run()
                found.add(pipe.unet(latents, 500, row[None].clone()).sample.numpy().tobytes())
            assert handle._engine.counts[form] == len(found) == COUNT
            assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], form
