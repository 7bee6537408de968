"""`train --calibrate`: the rule of its choice, what a strength does to a concept, and that nothing else is touched."""

import pytest
import torch

from perfusion import Concept
from perfusion.base import describe_base
from perfusion.training import train
from perfusion.training.calibrate import BIASES, STRENGTHS, Candidate, _Vectors, calibrate, choose
from perfusion.training.data import read_pictures
from perfusion.training.session import TrainingSession
from tests.kernels.tolerance import assert_close, exactly
from tests.perfusion.learning import (
    NAME,
    SHORT,
    SUPERCLASS,
    assert_unchanged,
    covariance_of,
    learn,
    same,
    settings,
    snapshot,
    write_pictures,
)
from tests.perfusion.tiny import tiny_sd


@pytest.fixture
def session(tmp_path):
    pipe, config = tiny_sd(), settings(learning_rate=0.3, word_learning_rate=0.1)
    pictures = read_pictures(write_pictures(tmp_path / "pictures", mask=True), config, 16, None, step=4)
    before = snapshot(pipe)
    with TrainingSession(pipe, describe_base(pipe), config, covariance_of(pipe), pictures) as found:
        # every step on the pictures and the noise that calibration draws, so that the loss it measures falls on any random UNet
        for step in range(12):
            found.step = -1
            found.train_step()
            found.step = step + 1
        yield found
    assert_unchanged(pipe, before)


def test_the_least_drift_among_those_that_keep_the_gain():
    tried = [Candidate(1.0, 0.5, 0.1, 1.0, 0.9), Candidate(1.0, 0.7, 0.2, 0.92, 0.3), Candidate(0.7, 0.7, 0.3, 0.6, 0.1)]
    assert choose(tried, 0.9) == tried[1] and choose(tried, 0.95) == tried[0] and choose(tried, 0.5) == tried[2]


@pytest.mark.numeric
def test_what_is_found_is_in_the_concept(session):
    state, before = session.state(), session.concept()
    concept, report = calibrate(session)
    assert len(report.candidates) == len(STRENGTHS) * len(BIASES)
    assert concept.bias == report.chosen["bias"] in BIASES and report.chosen["strength"] in STRENGTHS
    best = min(each.loss for each in report.candidates)
    assert best < report.superclass_loss
    taken = next(each for each in report.candidates if (each.strength, each.bias) == (report.chosen["strength"], report.chosen["bias"]))
    assert taken.gain >= 0.9 and all(other.drift >= taken.drift for other in report.candidates if other.gain >= 0.9)
    # the optimiser has moved nothing: what is stored is what was learned, scaled
    ends = session.start_values.double(), before.value_outputs.double()
    assert_close(concept.value_outputs, *exactly(lambda: torch.lerp(*ends, taken.strength)))
    after = session.state()
    assert all(torch.equal(after[name], value) for name, value in state.items() if name.startswith("adam."))
    session.restore(session.step, state)
    session.inference = before.bias, before.temperature
    assert same(session.concept(), before)


def test_a_lower_strength_drifts_less_and_learns_less(session):
    """Both vanish with the strength; how they do between is the model's."""
    _, report = calibrate(session, strengths=(0.0001, 1.0), biases=(0.7,))
    weak, full = report.candidates
    assert full.gain == 1 and 0 < weak.drift < 0.01 * full.drift and abs(weak.gain) < 0.05


def test_strength_zero_is_the_superclass_and_a_target_follows_its_word(session):
    learned = _Vectors.of(session)
    none = learned.scaled(session, 0.0)
    assert torch.equal(none.values, session.start_values) and all(map(torch.equal, none.words, session.start_words))
    half = learned.scaled(session, 0.5)
    with half.used(session):
        concept, captions = session.concept(), sorted(session._places)
        at_word = session._read(captions)[0][torch.arange(len(captions)), session._places_of(captions)]
    assert concept.similarity(at_word).mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(session.value_outputs, learned.values)  # given back


def test_bad_arguments(session):
    for wrong in ({"keep": 0}, {"keep": 1.5}, {"strengths": ()}, {"biases": ()}):
        with pytest.raises(ValueError, match="calibrate"):
            calibrate(session, **wrong)


def test_training_writes_it_and_a_run_may_be_calibrated_later(tmp_path):
    """The checkpoint is of what was learned, so calibrating twice does not scale twice."""
    pictures, pipe = write_pictures(tmp_path / "pictures"), tiny_sd()
    plain = learn(pipe, pictures, output=tmp_path / "plain", checkpoint_every=4)
    assert plain.bias == 0.7
    given = {**SHORT, "covariance": covariance_of(pipe), "progress": False, "calibrate": True, "checkpoint_every": 4}
    once = train(pipe, pictures, SUPERCLASS, NAME, output=tmp_path / "once", **given)
    assert Concept.load(tmp_path / "once" / f"{NAME}.safetensors").bias == pytest.approx(once.bias)
    later = train(pipe, pictures, SUPERCLASS, NAME, output=tmp_path / "plain", resume="latest", **given)
    again = train(pipe, pictures, SUPERCLASS, NAME, output=tmp_path / "plain", resume="latest", **given)
    assert same(later, once) and same(again, once) and later.bias == once.bias
