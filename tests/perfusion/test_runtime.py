"""The numpy parts of the runtime, each against what it stands for in torch and diffusers."""

import math

import diffusers
import numpy as np
import pytest
import torch

from perfusion.base import describe_base
from perfusion.exporting.scheduler import read_schedule
from perfusion.runtime.concept import Concept
from perfusion.runtime.key_value import EditedRow, Use, concept_gates, dependent_concepts
from perfusion.runtime.noise import randn
from perfusion.runtime.schedulers import sampler
from tests.kernels import plain
from tests.kernels.tolerance import Exact, as_run, assert_close, assert_same_run, exactly
from tests.perfusion.editing import inverse_covariance, make_concept, use, written_out
from tests.perfusion.tiny import tiny_sd

CONSTANTS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


@pytest.mark.numeric
@pytest.mark.parametrize("shape", [(4, 4), (4, 8, 8), (5, 7), (3, 64, 63)])
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32 + 5, 2**63 - 1])
def test_noise_is_torchs(shape, seed):
    expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).double()
    drawn = randn(shape, seed)
    assert drawn.dtype == np.float32
    radius = 2**0.5 * expected.abs().max()  # at least that of every pair; the angle that is rounded goes up to 2π
    assert_close(torch.from_numpy(drawn), Exact(expected, 2 * math.pi * radius), roundings=4)


def test_little_noise_is_refused():
    with pytest.raises(ValueError, match="at least 16 numbers"):
        randn((3, 5), 0)


def schedulers():
    for spacing in ("leading", "trailing", "linspace"):
        for prediction in ("epsilon", "v_prediction", "sample"):
            options = dict(CONSTANTS, timestep_spacing=spacing, prediction_type=prediction)
            yield pytest.param(
                diffusers.DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=False), id=f"ddim-{spacing}-{prediction}"
            )
            yield pytest.param(diffusers.EulerDiscreteScheduler(**options), id=f"euler-{spacing}-{prediction}")
            if prediction != "sample":
                yield pytest.param(diffusers.PNDMScheduler(**options, skip_prk_steps=True), id=f"pndm-{spacing}-{prediction}")
    clipped = diffusers.DDIMScheduler(**CONSTANTS, clip_sample=True, clip_sample_range=0.7, set_alpha_to_one=True)
    yield pytest.param(clipped, id="ddim-clipped")
    rescaled = dict(CONSTANTS, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    yield pytest.param(diffusers.DDIMScheduler(**rescaled, clip_sample=False), id="ddim-zero-snr")


@pytest.mark.numeric
@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("scheduler", list(schedulers()))
def test_samplers_are_diffusers(scheduler, steps):
    """The whole course of a sampling, with a prediction that depends on latents and timestep."""
    scheduler.set_timesteps(steps)
    schedule, alphas = read_schedule(scheduler)
    mine = sampler(schedule, alphas, steps)
    assert_close(torch.tensor(np.array(mine.timesteps), dtype=torch.float32), Exact(*[scheduler.timesteps.double()] * 2))
    noise = randn((2, 4, 8, 8), 0)
    ours = noise * np.float32(mine.initial_scale)

    def run():
        scheduler.set_timesteps(steps)
        theirs = torch.from_numpy(noise) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            prediction = torch.sin(scheduler.scale_model_input(theirs, timestep) + timestep / 500) / 2
            theirs = scheduler.step(prediction, timestep, theirs)[0]
        return theirs

    for step in range(len(mine.timesteps)):
        ours = mine.step(np.sin(mine.scaled(ours, step) + np.float32(mine.timesteps[step] / 500)) / 2, ours, step)
    assert ours.dtype == np.float32
    assert_same_run(ours, as_run(run))


def test_steps_have_a_range():
    schedule, alphas = read_schedule(diffusers.DDIMScheduler(**CONSTANTS))
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"from 1 to 1000, got {steps}"):
            sampler(schedule, alphas, steps)


@pytest.fixture(scope="module")
def base():
    return describe_base(tiny_sd())


@pytest.fixture(scope="module")
def concepts(base):
    return [make_concept(base, name, seed=seed, unlocked=name == "mug") for seed, name in enumerate(("teddy", "teapot", "mug"), 1)]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.numeric
@pytest.mark.parametrize("by_word", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_gates_are_the_operators(concepts, count, by_word):
    encodings = numbers(1, 9, 16)
    targets, metric_targets = (torch.stack([getattr(each, name) for each in concepts[:count]]) for name in ("target", "metric_target"))
    bias, temperature = torch.linspace(0.2, 0.6, count), torch.linspace(0.1, 0.3, count)
    index = torch.arange(count, dtype=torch.int32)[None]
    doubles = (each.double() for each in (encodings, targets, metric_targets))
    settings = bias.double(), temperature.double()
    places, floor = [(1, 3), (4,), (3, 8)][:count], [0.9, 0.0, 0.4][:count]  # of several words; two concepts claim one place
    words = {}
    if by_word:
        rows = torch.tensor([[*each, -1][:2] for each in places], dtype=torch.int32)
        words = {"places": rows[None], "floor": torch.tensor([floor], dtype=torch.float64)}
    arguments = *doubles, index, *(each[None] for each in settings), words.get("places"), words.get("floor")
    expected = exactly(plain.concept_gates, *arguments)
    words = {"places": places, "floor": floor} if by_word else {}
    found = concept_gates(encodings[0], targets, metric_targets, *(each.numpy() for each in settings), **words)
    for mine, theirs in zip(found, expected):
        assert_close(torch.from_numpy(mine), theirs[0])


def test_dependent_concepts_are_found(concepts):
    targets, metric_targets = (np.stack([getattr(each, name) for each in (*concepts, concepts[0])]) for name in ("target", "metric_target"))
    assert dependent_concepts(targets[:3], metric_targets[:3]) == []
    assert dependent_concepts(targets, metric_targets) == [0, 3]


@pytest.mark.numeric
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_keys_and_values_are_the_papers(base, concepts, count, dtype, monkeypatch):
    """K and V of all layers at once, against eq. 3 and 4 written out in float64 for each."""
    monkeypatch.setattr("perfusion.runtime.key_value.BLOCK", 7)  # several blocks, the last one smaller
    encodings, chosen = numbers(9, 16), concepts[:count]
    weights = [numbers(base.outputs, 16, seed=seed).numpy().astype(dtype) for seed in (1, 2)]
    row = EditedRow(encodings, *weights, [Use(Concept.of(each), (), 0.8, 0.3, 0.4) for each in chosen])
    uses = [use(each, 0.8, 0.3, 0.4) for each in chosen]
    for found, weight, kind in zip(row.at(), weights, ("key", "value")):
        exact = torch.from_numpy(weight).double()
        outputs = [each.value_outputs if kind == "value" else each.key_outputs for each in chosen]
        outputs = [exact @ each.superclass_encoding.double() if output is None else output for each, output in zip(chosen, outputs)]
        (expected,) = exactly(lambda: written_out(encodings, exact, uses, outputs) if count else encodings.double() @ exact.T)
        assert found.dtype == np.float32
        assert_close(torch.from_numpy(found), expected, kind)


def test_schedules_are_their_constants_step_by_step(base, concepts):
    encodings = numbers(9, 16)
    weights = [numbers(base.outputs, 16, seed=seed).numpy() for seed in (1, 2)]

    def row(bias, strength):
        return EditedRow(encodings, *weights, [Use(Concept.of(concepts[0]), (), strength, bias, 0.4)])

    scheduled = row([0.1, 0.5], lambda step: 1.0 / (1 + step))
    assert scheduled.changes and not row(0.1, 1.0).changes
    for step, (bias, strength) in enumerate([(0.1, 1.0), (0.5, 0.5), (0.5, 1 / 3)]):  # the last number goes on
        for found, expected in zip(scheduled.at(step), row(bias, strength).at()):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.numeric
def test_the_metric_of_these_tests_is_one(base, concepts):
    """Or the written-out form would not be of these concepts."""
    inverse, target = inverse_covariance(16), concepts[0].target.double()
    largest = (inverse @ target).abs().max()
    assert_close(concepts[0].metric_target, *exactly(lambda: inverse @ target / largest))
