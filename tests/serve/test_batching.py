"""The batch: rows join and leave between steps, and each is what it is alone. In one process and one thread, so every order is the test's."""

import concurrent.futures
import io
import random
import threading
import types
import zlib

import numpy
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

import perfusion
from perfusion.concept import Concept
from perfusion.errors import UnsupportedPipeline
from perfusion.serve.batching import Batcher, StepReport
from perfusion.serve.drawing import ConceptUse, Drawing, Failure, Picture
from perfusion.serve.store import DamagedFile
from tests.perfusion.tiny import tiny_sd, tiny_sdxl

pytestmark = pytest.mark.serve

CLOSE = 2  # of 255: what other orders of the same sums may change in a pixel


class Inline(concurrent.futures.Executor):
    """What is done beside the steps is done at once."""

    def submit(self, function, *arguments):
        function(*arguments)


class Bench:
    """A Batcher and what it reported."""

    def __init__(self, concepts, pipe=None, *, side=Inline(), **options):
        self.outcomes, self.pictures, self.steps = {}, [], []
        self.batcher = Batcher({"toybox": pipe or tiny_sd()}, concepts, self.hear, side=side, **options)
        self.batcher.step()  # this is the stepping thread

    def hear(self, report):
        if isinstance(report, StepReport):
            self.steps.append(report)
        elif isinstance(report, Picture) and report.step < report.steps:
            self.pictures.append(report)
        else:
            assert report.id not in self.outcomes, "answered twice"
            self.outcomes[report.id] = report

    def run(self, drawings):
        for drawing in drawings:
            self.batcher.submit(drawing)
        while self.batcher.working:
            self.batcher.step(timeout=0.05)
        return self.outcomes


def pixels(outcome):
    assert isinstance(outcome, Picture), outcome
    return numpy.asarray(Image.open(io.BytesIO(outcome.data))).astype(int)


@pytest.fixture(scope="module")
def concepts(world, digests):
    known = {digest: (world / f"{name}.safetensors").read_bytes() for name, digest in digests.items()}
    return known.__getitem__


@pytest.fixture(scope="module")
def draw(digests):
    def draw(id, prompt="a <teddy> on the beach", **more):
        uses = tuple(ConceptUse(name, digest) for name, digest in digests.items() if f"<{name}>" in prompt)
        plain = dict(model="toybox", width=16, height=16, seed=zlib.crc32(str(id).encode()), steps=6, guidance_scale=5.0, concepts=uses)
        return Drawing(**{**plain, **more, "id": str(id), "prompt": prompt})

    return draw


def test_a_row_is_what_the_pipeline_draws(concepts, draw, digests):
    """With concepts, schedules, regions and guidance of its own, beside others."""
    left = numpy.zeros((8, 8), numpy.uint8)
    left[:, :4] = 255
    two = (ConceptUse("bear", digests["teddy"], strength=(0.0, 1.0, 2.0), region=left), ConceptUse("pot", digests["teapot"], bias=0.5))
    drawings = [
        draw(1, seed=1), draw(2, "a cat", seed=2, steps=4, concepts=()), draw(3, seed=3, guidance_scale=1.0, steps=9),
        draw(4, "a <bear> and a <pot>", seed=4, concepts=two), draw(5, negative_prompt="a <teddy>", seed=5, steps=3, key_lock="global"),
    ]  # fmt: skip
    outcomes = Bench(concepts).run(drawings)

    pipe = tiny_sd()
    handle = perfusion.attach(pipe)
    for name in ("teddy", "teapot"):
        handle.load(Concept.from_bytes(concepts(digests[name])), name)
    masks = {"teddy": torch.from_numpy(left).float() / 255}
    regional = perfusion.Request("a <teddy> and a <teapot>", strength={"teddy": [0.0, 1.0, 2.0]}, bias={"teapot": 0.5}, regions=masks)
    locked = perfusion.Request("a <teddy> on the beach", key_lock="global")
    for drawing, prompt in zip(drawings, ["a <teddy> on the beach", "a cat", "a <teddy> on the beach", regional, locked]):
        negative = perfusion.Request(drawing.negative_prompt, key_lock=drawing.key_lock)
        alone = pipe(
            [prompt], negative_prompt=[negative], num_inference_steps=drawing.steps, guidance_scale=drawing.guidance_scale,
            generator=torch.Generator().manual_seed(drawing.seed), output_type="np",
        ).images[0]  # fmt: skip
        assert abs(alone * 255 - pixels(outcomes[drawing.id])).max() <= CLOSE, drawing.id
        assert alone.std() > 0.02


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_come_and_go_and_none_notices(concepts, draw, seed):
    """Arrivals, sizes and cancellations at random: who is left has the picture that it has alone."""
    chance = random.Random(seed)
    prompts = ["a <teddy>", "a <teapot> on the beach", "a <cup> and a <teddy>", "a cat", "a <cat> in the snow"]
    drawings = [
        draw(number, chance.choice(prompts), seed=number, steps=chance.randint(2, 7), guidance_scale=chance.choice([1.0, 4.0, 8.0]),
             strength=chance.choice([None, 0.5, (0.0, 1.0)]), width=chance.choice([16, 16, 24]))
        for number in range(10)
    ]  # fmt: skip
    bench, waiting, cancelled = Bench(concepts, rows=4), list(drawings), set()
    while waiting or bench.batcher.working:
        for _ in range(min(len(waiting), chance.choice([0, 0, 1, 3]))):
            bench.batcher.submit(waiting.pop(0))
        bench.batcher.step()
        if chance.random() < 0.15 and bench.batcher._live:
            gone = chance.choice(sorted(bench.batcher._live))
            cancelled.add(gone)
            bench.batcher.cancel(gone)
    assert set(bench.outcomes) == {drawing.id for drawing in drawings} - cancelled and cancelled
    assert max(step.rows for step in bench.steps) == 4 and min(step.rows for step in bench.steps) < 4
    bench.run([draw("plain", "a cat", concepts=())])  # the last prompt's are let go
    assert not any(resident.pins for resident in bench.batcher.bases["toybox"].store._residents.values()), "a concept is held for nobody"
    alone = Bench(concepts)
    for drawing in drawings:
        if drawing.id not in cancelled:
            alone.run([drawing])
            assert abs(pixels(alone.outcomes[drawing.id]) - pixels(bench.outcomes[drawing.id])).max() <= CLOSE, drawing


def test_the_same_sizes_give_the_same_bits_whoever_is_beside(concepts, draw):
    """At the same place in batches of the same sizes a picture is equal bit for bit, with other neighbours, concepts and settings."""
    own = draw("own", seed=7, steps=6, strength=(1.0, 0.5))

    def beside(prompt, **more):
        bench = Bench(concepts)
        latents = []
        advance = bench.batcher.bases["toybox"].advance
        bench.batcher.bases["toybox"].advance = lambda row, noise: (advance(row, noise), latents.append(row.latents) if row.drawing is own else 0)[0]
        bench.batcher.submit(draw("first", prompt, steps=8, **more))
        bench.batcher.step()
        bench.batcher.submit(own)
        bench.batcher.step()
        bench.run([draw("third", prompt, steps=2, **more)])
        assert [step.rows for step in bench.steps] == [1, 2, 3, 3, 2, 2, 2, 1]
        return torch.cat(latents)

    assert torch.equal(beside("a <teapot>", seed=1), beside("a <cup> and a <cat>", seed=2, guidance_scale=9.0, bias=0.3))


def test_no_forward_mixes_concepts_when_it_is_told_not_to(concepts, draw):
    prompts = ["a <teddy>", "a <teapot>", "a <teddy> in the snow", "a cat"]
    bench = Bench(concepts, split_by_concept=True)
    bench.run([draw(number, prompt) for number, prompt in enumerate(prompts)])
    assert sorted({step.ids for step in bench.steps}) == [("0", "2"), ("1",), ("3",)]


def test_from_a_picture(concepts, draw, digests):
    pipe = tiny_sd()
    image = numpy.random.default_rng(0).integers(0, 255, (16, 16, 3), numpy.uint8)
    bench = Bench(concepts)
    bench.run([draw(1, "a cat", concepts=(), image=image, image_strength=0.6, steps=10, seed=5), draw(2, steps=5)])
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    alone = other(
        "a cat", Image.fromarray(image), 0.6, 10, guidance_scale=5.0, generator=torch.Generator().manual_seed(5), output_type="np"
    ).images[0]
    assert abs(alone * 255 - pixels(bench.outcomes["1"])).max() <= CLOSE


def test_outside_a_mask_the_latents_stay(concepts, draw):
    image = numpy.random.default_rng(0).integers(0, 255, (16, 16, 3), numpy.uint8)
    mask = numpy.zeros((16, 16), numpy.uint8)
    mask[:, 8:] = 255
    bench, rows = Bench(concepts), []
    base = bench.batcher.bases["toybox"]
    advance = base.advance
    base.advance = lambda row, noise: (advance(row, noise), rows.append(row))[0]
    bench.run([draw(1, image=image, mask=mask, steps=4)])
    assert torch.equal(rows[-1].latents[..., :4], rows[-1].image_latents[..., :4])
    assert not torch.isclose(rows[-1].latents[..., 4:], rows[-1].image_latents[..., 4:]).all(-1).any()


def test_of_the_xl_family(draw):
    pipe = tiny_sdxl()
    alone = tiny_sdxl()("a cat", num_inference_steps=4, guidance_scale=5.0, generator=torch.Generator().manual_seed(3), output_type="np").images[0]
    bench = Bench({}.__getitem__, pipe)
    side = len(alone)
    bench.run([draw(number, "a cat", seed=seed, steps=4, concepts=(), width=side, height=side) for number, seed in enumerate((3, 4))])
    assert abs(alone * 255 - pixels(bench.outcomes["0"])).max() <= CLOSE


def test_previews_come_before_the_picture(concepts, draw):
    bench = Bench(concepts)
    bench.run([draw(1, previews=3, steps=8), draw(2, previews=3, steps=2)])
    assert [(picture.id, picture.step) for picture in bench.pictures] == [("2", 1), ("1", 2), ("1", 4), ("1", 6)]


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.proof)])
def test_more_concepts_than_places(draw, digests, concepts, count, survived):
    """They come and go, read by a thread beside the steps; each picture is of its own concept, and the bank has no more than its places."""
    files = [concepts(digest) for digest in digests.values()]
    read = []

    def read_file(digest):
        read.append(digest)
        return files[int(digest) % 4]

    with concurrent.futures.ThreadPoolExecutor(1) as side:
        bench = Bench(read_file, capacity=8, rows=4, side=side)
        store, batcher = bench.batcher.bases["toybox"].store, bench.batcher
        order = random.Random(0).sample(range(count), count)
        for number in order + order[-2:]:
            use = ConceptUse("teddy", f"{number:064}")
            batcher.submit(draw(f"{number}-{len(store)}", "a <teddy>", concepts=(use,), seed=1, steps=2))
            while batcher.working >= 6:
                batcher.step(timeout=0.05)
        bench.run([])
    first = {}
    for id, outcome in bench.outcomes.items():
        kind = int(id.partition("-")[0]) % 4
        assert abs(pixels(outcome) - pixels(first.setdefault(kind, outcome))).max() <= CLOSE, id
    assert len({outcome.data for outcome in first.values()}) == 4
    assert len(store) == count and len(store.resident()) == 8 and store.loads >= count and store.evictions == store.loads - 8
    assert batcher.bases["toybox"].misses + batcher.bases["toybox"].hits == count + 2
    survived(f"{count:,} concepts through 8 places", f"{len(bench.outcomes):,} pictures, each of its own concept")


def test_a_full_bank_waits_for_a_place(draw, digests, concepts):
    """Where all places are in use, the drawing fails by name and its neighbours do not notice."""
    bench = Bench(concepts, capacity=1, rows=4)
    held = (1.0, 0.5)  # a schedule needs its concept at every step
    bench.run([draw(1, "a <teddy>", strength=held), draw(2, "a <teapot>", strength=held), draw(3, "a <teddy>")])
    assert isinstance(bench.outcomes["1"], Picture) and isinstance(bench.outcomes["3"], Picture)
    assert bench.outcomes["2"].kind == "memory"


class Short:
    """A UNet's forward with memory for so many rows of 8 x 8 latents."""

    def __init__(self, unet, room):
        self.forward, self.room, self.refused = unet.forward, room, 0

    def __call__(self, sample, *arguments, **more):
        if sample[:, 0].numel() > self.room * 64:
            self.refused += 1
            raise torch.OutOfMemoryError("no memory")
        return self.forward(sample, *arguments, **more)


def test_a_picture_that_does_not_fit_takes_no_other_with_it(concepts, draw, survived):
    pipe = tiny_sd()
    pipe.unet.forward = short = Short(pipe.unet, room=4)
    bench = Bench(concepts, pipe)
    bench.run([*(draw(number) for number in range(5)), draw("large", width=64, height=64)])
    assert bench.outcomes["large"].kind == "memory" and "smaller" in bench.outcomes["large"].message
    assert all(isinstance(bench.outcomes[str(number)], Picture) for number in range(5))
    assert short.refused <= 4, "what was found out is remembered"
    survived("memory has no room for one of six pictures", f"it is refused, the other {len(bench.outcomes) - 1} are drawn")


def test_whose_fault_it_is_shows_when_each_is_alone(concepts, draw):
    pipe = tiny_sd()
    bench = Bench(concepts, pipe)
    advance = bench.batcher.bases["toybox"].advance

    def fail(row, noise):
        if row.drawing.id == "bad":
            raise RuntimeError("broken")
        return advance(row, noise)

    bench.batcher.bases["toybox"].advance = fail
    bench.run([draw(1), draw("bad"), draw(2)])
    assert bench.outcomes["bad"] == Failure("bad", "internal", "RuntimeError: broken")
    assert isinstance(bench.outcomes["1"], Picture) and isinstance(bench.outcomes["2"], Picture)


def test_what_is_wrong_with_a_prompt_is_said_in_its_own_words(concepts, draw, digests):
    bench = Bench(concepts)
    bench.run([draw(1, "cat " * 200 + "<teddy>"), draw(2, "a <teddy> and a <bear>", concepts=tuple(ConceptUse(n, digests["teddy"]) for n in ("teddy", "bear")))])
    assert bench.outcomes["1"].kind == "invalid" and "<teddy> lies beyond the 77 tokens" in bench.outcomes["1"].message
    assert digests["teddy"][:8] not in bench.outcomes["1"].message


def test_a_damaged_concept_is_named_as_such(draw):
    def read(digest):
        raise DamagedFile("its file is damaged; upload it again")

    bench = Bench(read)
    bench.run([draw(1), draw(2, "a cat", concepts=())])
    message = "concept 'teddy' cannot be used: its file cannot be read: its file is damaged; upload it again"
    assert bench.outcomes["1"] == Failure("1", "conflict", message) and isinstance(bench.outcomes["2"], Picture)


def test_prompts_are_encoded_beside_the_steps(concepts, draw):
    """With a thread of its own for text and pictures, the result is the same."""
    bench = Bench(concepts)
    beside = Batcher({"toybox": tiny_sd()}, concepts, bench.hear)
    for number in range(6):
        beside.submit(draw(number, seed=number))
    while beside.working:
        beside.step(timeout=0.05)
    alone = Bench(concepts).run([draw(number, seed=number) for number in range(6)])
    for id, outcome in alone.items():
        assert abs(pixels(outcome) - pixels(bench.outcomes[id])).max() <= CLOSE


def test_on_a_cpu_prompts_that_wait_go_before_a_step(concepts, draw):
    """As many as there are places for: the first step has them all, and one whose prompt is refused holds nobody up."""
    with concurrent.futures.ThreadPoolExecutor(1) as side:
        bench = Bench(concepts, rows=4, side=side)
        bench.run([draw("bad", "cat " * 200 + "<teddy>"), *(draw(number, steps=3) for number in range(6))])
    assert bench.steps[0].rows == 4 and bench.outcomes["bad"].kind == "invalid"
    assert all(isinstance(bench.outcomes[str(number)], Picture) for number in range(6))


def test_who_waits_for_the_only_place_gets_it(concepts, draw):
    """As a worker waits: without an end. `submit` is the only thing that would wake it."""
    bench = Bench(concepts, rows=1)
    for drawing in [draw(0), draw(1)]:
        bench.batcher.submit(drawing)
    steps = threading.Thread(target=lambda: [bench.batcher.step(timeout=None) for _ in range(12)], daemon=True)
    steps.start()
    steps.join(60)
    assert not steps.is_alive() and set(bench.outcomes) == {"0", "1"}


def test_a_model_without_a_unet_is_refused_by_name(concepts):
    with pytest.raises(UnsupportedPipeline, match="model 'toybox' is a SimpleNamespace; the server steps models around a UNet"):
        Bench(concepts, pipe=types.SimpleNamespace(transformer=object()))
