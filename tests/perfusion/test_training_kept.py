"""Nothing that was learned is lost: every way in which a training can end, and what is on the disk then."""

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from perfusion.concept import Concept
from perfusion.termination import Terminated
from perfusion.training import checkpoints
from perfusion.training.session import TrainingSession
from tests.perfusion.editing import draw
from tests.perfusion.learning import learn, same, train_module, write_pictures
from tests.perfusion.tiny import tiny_sd

pytestmark = pytest.mark.filterwarnings("ignore:.*few. a concept takes")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("kept") / "pictures", mask=True)


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_sd()
    draw(pipe, "a teddy")
    return pipe


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    monkeypatch.setattr(train_module, "VALIDATION_STEPS", 1)


def newest(folder):
    path = checkpoints.latest(folder / "checkpoints")
    return path and path.stem


def at_step(monkeypatch, step, act):
    """Do something when `step` steps are done, in the midst of the next one."""
    draw_batch = TrainingSession._draw
    monkeypatch.setattr(TrainingSession, "_draw", lambda session: (act() if session.step == step else None, draw_batch(session))[1])


def fail(error):
    raise error


# Before the first step


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a {} and a <other>", "no concept <other> is loaded"),
        ("a {} and a {}", 'hold "{}" once'),
        (" ".join(["red"] * 80) + " {}", "lies beyond the 77 tokens"),
        ("a <mine:9> and {}", "strength must be a number between 0 and 4"),
    ],
)
def test_a_validation_prompt_that_cannot_be_drawn_is_refused_before_the_first_step(pipe, pictures, tmp_path, monkeypatch, prompt, message):
    monkeypatch.setattr(TrainingSession, "train_step", lambda _: pytest.fail("a step was made"))
    with pytest.raises(ValueError, match=f"training: validation_prompts.* {message}"):
        learn(pipe, pictures, output=tmp_path / "out", validation_prompts=("a {}", prompt))
    assert not (tmp_path / "out").exists()


# Ways out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_keeps_the_last_step(pipe, pictures, tmp_path, monkeypatch, number):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt) as ended:
        learn(pipe, pictures, output=tmp_path)
    assert newest(tmp_path) == "step-000002"
    assert isinstance(ended.value, Terminated) == (number != signal.SIGINT)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


def test_a_signal_that_is_ignored_stays_ignored(pipe, pictures, tmp_path, monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
        learn(pipe, pictures, output=tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "README.md").is_file()


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ValueError("not finite"), MemoryError(), SystemExit(1)], ids=repr)
def test_any_error_keeps_the_last_step(pipe, pictures, tmp_path, monkeypatch, error):
    at_step(monkeypatch, 3, lambda: fail(error))
    with pytest.raises(type(error)):
        learn(pipe, pictures, output=tmp_path)
    assert newest(tmp_path) == "step-000003"


def test_out_of_memory_in_a_step_says_which_options_need_less(pipe, pictures, tmp_path, monkeypatch):
    at_step(monkeypatch, 1, lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
    with pytest.raises(ValueError, match="out of memory at step 2: CUDA out of memory.* Use low_memory=True, or a smaller micro_batch"):
        learn(pipe, pictures, output=tmp_path)
    assert newest(tmp_path) == "step-000001"


# Pictures


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no kernel image")], ids=repr)
def test_pictures_that_cannot_be_drawn_cost_nothing_else(pipe, pictures, tmp_path, monkeypatch, error):
    whole = learn(pipe, pictures)
    there = []

    def sample(session, *_):
        there.append((newest(tmp_path), (tmp_path / "mine.safetensors").exists()))
        raise error

    monkeypatch.setattr(TrainingSession, "sample", sample)
    with pytest.warns(UserWarning, match="could not be drawn .*what was learned is kept"):
        concept = learn(pipe, pictures, output=tmp_path, validation_every=2, checkpoint_every=3)
    assert same(whole, concept) and "gallery.png" not in (tmp_path / "README.md").read_text()
    # a checkpoint stood there before anything was drawn, and the concept's file before the gallery
    assert there == [("step-000002", False), ("step-000004", False), ("step-000004", True)]


def test_a_process_that_dies_while_it_draws_has_its_checkpoint(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingSession, "sample", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    in_a_process(lambda: learn(tiny_sd(), pictures, output=tmp_path, validation_every=2, checkpoint_every=100)).join()
    assert newest(tmp_path) == "step-000002"


# A full disk


def full(monkeypatch, times=10**9):
    """The disk takes no checkpoint and no concept in the folder."""
    write, left = checkpoints.save_tensors, [times]

    def save_tensors(*arguments):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(checkpoints, "save_tensors", save_tensors)


def test_a_full_disk_for_a_while_is_warned_about_and_training_goes_on(pipe, pictures, tmp_path, monkeypatch):
    full(monkeypatch, times=2)
    with pytest.warns(UserWarning, match="no checkpoint could be written at step 1 .No space left on device.; training goes on"):
        concept = learn(pipe, pictures, output=tmp_path, checkpoint_every=1)
    assert newest(tmp_path) == "step-000004" and same(concept, learn(pipe, pictures))


def test_a_checkpoint_goes_only_when_the_next_is_there(pipe, pictures, tmp_path, monkeypatch):
    learn(pipe, pictures, output=tmp_path, steps=2, checkpoint_every=1, checkpoint_limit=1)
    full(monkeypatch)
    with pytest.warns(UserWarning, match="no checkpoint could be written"):
        learn(pipe, pictures, output=tmp_path, steps=4, resume="latest", checkpoint_every=1, checkpoint_limit=1)
    assert newest(tmp_path) == "step-000002"


def test_a_concept_that_its_folder_does_not_take_is_kept_elsewhere(pipe, pictures, tmp_path, monkeypatch):
    save, temporary = Concept.save, tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(train_module.tempfile, "gettempdir", lambda: str(temporary))

    def refuse(concept, path, *arguments):
        if path.parent != temporary:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(concept, path, *arguments)

    monkeypatch.setattr(Concept, "save", refuse)
    with pytest.raises(OSError, match=r"No space left on device. The concept is finished and is kept in .*mine-\w+.safetensors") as error:
        learn(pipe, pictures, output=tmp_path / "out")
    monkeypatch.undo()
    (rescued,) = temporary.iterdir()
    assert str(rescued) in str(error.value) and Concept.load(rescued).name == "mine" and newest(tmp_path / "out") == "step-000004"


def test_a_log_that_cannot_be_written_ends_nothing(pipe, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module.TrainingLog, "__init__", lambda log, *a, **k: broken_log(log))
    with pytest.warns(UserWarning, match="the log cannot be written .No space left") as told:
        learn(pipe, pictures, output=tmp_path)
    assert sum("the log cannot" in str(each.message) for each in told) == 1


def broken_log(log):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = close = lambda self: None

    from tests.perfusion.learning import settings

    log.config, log.device, log._failed, log._file, log._board = settings(), torch.device("cpu"), False, Full(), None


# Going on


def test_resume_takes_a_folder_a_bare_name_and_latest(pipe, pictures, tmp_path):
    whole = learn(pipe, pictures, output=tmp_path / "whole", checkpoint_every=1, checkpoint_limit=9)
    for number, resume in enumerate(
        ("latest", "step-000002", "step-000002.safetensors", "2", "checkpoint-2", tmp_path / "part", tmp_path / "part" / "checkpoints")
    ):
        with contextlib.suppress(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
            at_step(patch, 2, lambda: fail(KeyboardInterrupt))
            learn(pipe, pictures, output=tmp_path / "part", overwrite=True)
        assert same(whole, learn(pipe, pictures, output=tmp_path / "part", resume=resume)), resume
    with pytest.raises(FileNotFoundError, match="no such checkpoint: step-7. In .*checkpoints' there are: step-000002"):
        learn(pipe, pictures, steps=9, output=tmp_path / "part", resume="step-7")
    with pytest.raises(ValueError, match="there is no checkpoint to continue from in .*empty"):
        (tmp_path / "empty").mkdir()
        learn(pipe, pictures, output=tmp_path / "part", resume=tmp_path / "empty")


def test_latest_is_the_newest_that_is_whole(pipe, pictures, tmp_path):
    whole = learn(pipe, pictures, output=tmp_path, checkpoint_every=1)
    path = checkpoints.latest(tmp_path / "checkpoints")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="step-000004.safetensors' is damaged: .*The one before it is taken"):
        again = learn(pipe, pictures, output=tmp_path, resume="latest")
    assert same(whole, again)


# Killed


def in_a_process(act):
    def quiet():
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            act()

    process = multiprocessing.get_context("fork").Process(target=quiet)
    process.start()
    return process


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_run_that_is_killed_at_any_moment_ends_in_the_same_bits(pipe, pictures, tmp_path):
    """SIGKILL, which nobody can catch, at random moments: of loading, of steps, of checkpoints, of drawing."""
    options = dict(steps=20, checkpoint_every=1, checkpoint_limit=2, validation_every=5)
    whole = learn(pipe, pictures, output=tmp_path / "whole", **options)
    chance, folder, kills = random.Random(0), tmp_path / "killed", 0

    def step():
        found = checkpoints.latest(folder / "checkpoints")
        return int(found.stem.split("-")[-1]) if found else 0

    def run():
        if (folder / "README.md").exists():
            return  # killed on its way out, with all done
        learn(pipe, pictures, output=folder, **options, **({"resume": "latest"} if step() else {"overwrite": True}))

    for _ in range(40):
        process, target = in_a_process(run), step() + chance.randint(1, 2)
        if kills < 6:  # a random moment after the next steps; the first time, of loading
            while kills and process.is_alive() and step() < target:
                time.sleep(0.002)
            process.join(chance.uniform(0, 0.05))
        else:
            process.join()
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        elif process.exitcode == 0:
            break
    assert kills >= 3 and process.exitcode == 0
    for name in ("value_outputs", "target", "metric_target", "superclass_encoding"):
        assert torch.equal(getattr(Concept.load(folder / "mine.safetensors"), name), getattr(whole, name).half().float()), name
    left, right = (checkpoints.load(checkpoints.latest(each / "checkpoints")) for each in (folder, tmp_path / "whole"))
    assert left.step == right.step and all(torch.equal(left.tensors[key], right.tensors[key]) for key in right.tensors)
