"""Threads that draw through pipelines of the same parts, and change what is loaded meanwhile."""

import contextlib
import copy
import threading

import pytest
import torch

from perfusion import Request, attach, encoding_registry
from perfusion.unet_concepts import UNetConcepts
from tests.perfusion.editing import PLAIN, draw, make_concept
from tests.perfusion.tiny import tiny_sd

pytestmark = pytest.mark.models

PROMPT, OTHER = "a photo of a <teddy> on a beach", "a cat next to a <teddy>"
WHILE = 0.3  # seconds in which a thread that does not wait would be done, or nearly: too short, and a fault could stay hidden


def sharing(pipe, *own):
    """A pipeline of the same parts, but for its scheduler and a copy of each tokenizer named."""
    parts = {**pipe.components, **{name: copy.deepcopy(getattr(pipe, name)) for name in own}}
    other = type(pipe)(**parts, requires_safety_checker=False)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    return other


class Meanwhile:
    """Runs something in another thread, from within a call of this one."""

    def __init__(self, action, within=WHILE):
        self.action, self.within = action, within
        self.result = self.error = self.inside = None
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            self.result = self.action()
        except BaseException as error:
            self.error = error  # for `end`

    def start(self, *arguments):
        """A hook: at its first call the other thread starts. inside: whether it was done before this returned."""
        if self.thread.ident is None:
            self.thread.start()
            self.thread.join(self.within)
            self.inside = not self.thread.is_alive()

    def end(self):
        self.thread.join(timeout=60)
        assert not self.thread.is_alive(), "the other thread waits for ever"
        if self.error is not None:
            raise self.error
        return self.result


@contextlib.contextmanager
def during(module, action, within=WHILE):
    """Inside, the action runs in another thread, which the module's first forward waits for."""
    meanwhile = Meanwhile(action, within)
    hook = module.register_forward_pre_hook(meanwhile.start)
    try:
        yield meanwhile
    finally:
        hook.remove()


# Prompts


@pytest.fixture
def two(pipe, teddy):
    """Two attached pipelines of the same parts, and their handles."""
    pipes = [pipe, sharing(pipe)]
    with attach(pipes[0]) as one, attach(pipes[1]) as other:
        for handle in (one, other):
            handle.load(teddy)
        yield pipes, (one, other)


def encoded(pipe, prompt):
    return torch.cat(pipe.encode_prompt([prompt], "cpu", 1, True, negative_prompt=["teddy"]))


@pytest.mark.parametrize("action", ["encode", "check", "load", "bind"])
def test_who_uses_a_tokenizer_waits_for_others_that_do(two, action):
    """A tokenizer keeps padding and truncation in itself: texts of one thread came out as long as those of another."""
    pipes, (one, other) = two
    expected = [encoded(pipes[0], PROMPT), encoded(pipes[1], OTHER)]
    actions = {
        "encode": lambda: encoded(pipes[1], OTHER),
        "check": lambda: other.check([OTHER]),
        "load": lambda: other.load(make_concept(other.base, "dog", seed=2)),
        "bind": lambda: other.bind(expected[1], [OTHER, "a cat"]),
    }
    with during(pipes[0].text_encoder, actions[action]) as meanwhile:
        assert torch.equal(encoded(pipes[0], PROMPT), expected[0])
    assert not meanwhile.inside
    result = meanwhile.end()
    assert action != "encode" or torch.equal(result, expected[1])


def test_pipelines_of_other_parts_do_not_wait(two, teddy):
    pipes, _ = two
    apart = tiny_sd(seed=1)
    with attach(apart) as handle:
        handle.load(make_concept(handle.base, "teddy"))
        with during(pipes[0].text_encoder, lambda: encoded(apart, OTHER), within=60) as meanwhile:
            encoded(pipes[0], PROMPT)
        assert meanwhile.inside
        meanwhile.end()


@pytest.mark.parametrize("prompt", [PLAIN[0], "teddy"])
def test_the_superclass_in_another_thread_gets_no_concept(pipe, teddy, prompt):
    """It goes through the same text encoder, while that waits for the same words of a prompt with a concept."""
    plain = sharing(pipe, "tokenizer")
    expected = encoded(plain, prompt)
    with attach(pipe) as handle:
        handle.load(teddy)
        own = encoded(pipe, PROMPT)
        with during(pipe.text_encoder, lambda: encoded(plain, prompt)) as meanwhile:
            assert torch.equal(encoded(pipe, PROMPT), own)
    assert torch.equal(meanwhile.end(), expected)


def test_a_registry_is_not_read_half_written(monkeypatch):
    rows = torch.randn(6, 7, 8)
    registry = encoding_registry.EncodingRegistry()
    registry.remember([(rows[:4], [object.__new__(encoding_registry.RowRequest) for _ in range(4)])])
    meanwhile = Meanwhile(lambda: registry.remember([(rows[4:], [None, None])]))
    own = encoding_registry._digest

    def digest(row):
        if threading.current_thread() is not meanwhile.thread:
            meanwhile.start()
        return own(row)

    monkeypatch.setattr(encoding_registry, "_digest", digest)
    assert set(registry.find(rows[:4])) == {0, 1, 2, 3}
    assert not meanwhile.inside
    meanwhile.end()


# Pictures


@pytest.mark.parametrize("attached", [True, False])
def test_threads_that_share_a_unet_do_not_disturb_each_other(pipe, teddy, attached):
    """A pipeline that is not attached needs a tokenizer of its own: see `attach`."""
    pipes = [pipe, sharing(pipe) if attached else sharing(pipe, "tokenizer")]
    prompts = [PROMPT, OTHER if attached else "a cat"]
    with contextlib.ExitStack() as stack:
        for each in pipes[: 1 + attached]:
            stack.enter_context(attach(each)).load(teddy)
        expected = [draw(each, prompt) for each, prompt in zip(pipes, prompts)]
        drawn = [Meanwhile(lambda each=each, prompt=prompt: [draw(each, prompt) for _ in range(3)]) for each, prompt in zip(pipes, prompts)]
        for each in drawn:
            each.thread.start()
        for each, image in zip(drawn, expected):
            assert all(torch.equal(found, image) for found in each.end())


def test_threads_that_share_a_unet_count_the_steps_of_their_own_schedules(pipe, teddy):
    """One thread is a step ahead of the other, so timesteps go up and down from one forward of the UNet to the next."""
    pipes = [sharing(pipe), sharing(pipe)]
    fading = Request(PROMPT, bias=[-0.5, 0.0, 0.5, 1.0])
    with attach(pipes[0]) as one, attach(pipes[1]) as other:
        one.load(teddy)
        other.load(teddy)
        expected = [draw(each, fading, num_inference_steps=4) for each in pipes]
        turns, results = [threading.Semaphore(1), threading.Semaphore(0)], {}

        def work(number):
            def hand_over(pipe, step, timestep, tensors):
                if (number, step) != (0, 0) and step < 3:
                    turns[1 - number].release()
                    assert turns[number].acquire(timeout=60)
                return tensors

            assert turns[number].acquire(timeout=60)
            results[number] = draw(pipes[number], fading, num_inference_steps=4, callback_on_step_end=hand_over)
            turns[1 - number].release(4)  # the other's remaining steps

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(results[number], expected[number]) for number in range(2))


@pytest.mark.parametrize("change", ["load", "unload", "set", "disable", "request", "attach", "detach"])
def test_changes_wait_for_the_forward_that_goes_on(two, change):
    """A forward that is going on is drawn with what was loaded and set as it began, from its first layer to its last."""
    pipes, (one, other) = two
    expected = draw(pipes[0], PROMPT, num_inference_steps=1)
    bare = UNetConcepts(pipes[0].unet)
    encodings = torch.randn(1, 77, 16)
    bare.load(make_concept(one.base, "dog", seed=2))
    changes = {
        "load": lambda: one.load(make_concept(one.base, "cup", seed=3)),
        "unload": lambda: one.unload("teddy"),
        "set": lambda: one.set("teddy", bias=0.9),
        "disable": one.disable,
        "request": lambda: bare.request(encodings, [[]]),
        "attach": lambda: attach(sharing(pipes[0])),
        "detach": other.detach,
    }
    with during(pipes[0].unet.conv_in, changes[change]) as meanwhile:
        assert torch.equal(draw(pipes[0], PROMPT, num_inference_steps=1), expected)
    assert not meanwhile.inside
    meanwhile.end()
    bare.detach()
    if change in ("set", "disable"):
        assert not torch.equal(draw(pipes[0], PROMPT, num_inference_steps=1), expected)


def test_a_forward_that_waited_while_perfusion_left_is_the_plain_one(pipe, teddy):
    """It began with hooks and ends without: whoever comes next must not wait for it."""
    handle, expected = attach(pipe), draw(pipe, "a cat")
    engine, other = handle._engine, sharing(pipe, "tokenizer")
    meanwhile = Meanwhile(lambda: draw(other, "a cat"))
    handle.load(teddy)
    with engine.between_forwards:
        meanwhile.start()
        assert not meanwhile.inside
        handle.detach()
    assert torch.equal(meanwhile.end(), expected)
    with attach(pipe) as handle:
        handle.load(teddy)
        draw(pipe, PROMPT)
