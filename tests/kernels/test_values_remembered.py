"""A check of values that passed is not made again while its tensors are the same ones, unchanged; in every other case it is."""

from functools import partial
from threading import Thread
from weakref import ref

import pytest
import torch
from torch._subclasses import FakeTensorMode

from perfusion_kernels import tensor_version, validation
from perfusion_kernels.schemas import SCHEMAS

from . import cases
from .mutants import assert_killed


@pytest.fixture(autouse=True)
def nothing_passed(monkeypatch):
    monkeypatch.setattr(validation, "_passed", {})


@pytest.fixture
def counted():
    """A call whose check refuses negative values, and what the check was called with."""
    calls = []

    def check(operator, *tensors_and_sizes):
        calls.append(tensors_and_sizes)
        if any((x < 0).any() for x in tensors_and_sizes if isinstance(x, torch.Tensor)):
            raise ValueError("negative")

    def run(*tensors, validate=None, operator="call", others=(), sizes=()):
        validation.check_values(check, operator, validate, (*tensors, *others), tensors, *sizes)

    return run, calls


def test_a_check_is_made_once_for_the_same_tensors(counted):
    run, calls = counted
    x, y = torch.zeros(2), torch.zeros(2)
    seen = [
        partial(run, x, y), partial(run, y, x), partial(run, x, x), partial(run, x), partial(run, x.clone()),
        partial(run, x.view(2)), partial(run, torch.nn.Parameter(x)), partial(run, x, sizes=(3,)), partial(run, x, operator="other"),
    ]  # fmt: skip
    for _ in range(3):
        for call in seen:
            call()
    run(x, others=(torch.ones(3), None))  # whose values the check does not look at
    assert len(calls) == len(seen)


def in_inference_mode(x):
    with torch.inference_mode():
        x[1:].fill_(-1)


def without_gradients(x):
    with torch.no_grad():
        x.sub_(1)


def by_an_optimiser(x):
    parameter = x.detach().requires_grad_()
    parameter.grad = torch.ones_like(x)
    torch.optim.SGD([parameter], lr=1.0, foreach=True).step()


WRITES = {
    "to itself": lambda x: x.fill_(-1),
    "to an element": lambda x: x.__setitem__(2, -1),
    "through a view": lambda x: x.view(2, 2)[1].sub_(1),
    "through what it is a view of": lambda x: x._base.sub_(1),
    "through what shares its memory": lambda x: x.detach().copy_(-torch.ones(4)),
    "as a result": lambda x: torch.sub(torch.zeros(4), 1, out=x),
    "in inference mode": in_inference_mode,
    "without gradients": without_gradients,
    "by an optimiser": by_an_optimiser,
    "compiled": lambda x: torch.compile(lambda x: x.sub_(1), backend="aot_eager")(x),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_noticed(counted, write):
    run, calls = counted
    x, y = torch.zeros(6)[1:5], torch.zeros(1)
    run(y, x)
    write(x)
    assert x.min() == -1
    for _ in range(2):  # a refusal is not remembered
        with pytest.raises(ValueError, match="negative"):
            run(y, x)
    x.abs_()
    run(y, x)
    run(y, x)
    assert len(calls) == 4


@pytest.mark.parametrize("operator", SCHEMAS)
def test_every_operator_notices_a_value_that_became_wrong(operator):
    call, arguments = cases.PUBLIC[operator], cases.make().arguments(operator)
    name = "bias" if operator == "concept_gates" else "key" if operator == "cross_attention_layer" else "gates"
    call(**arguments)
    call(**arguments)
    arguments[name][1] = torch.nan  # of a row all of whose places are used
    for validate in (None, None, True):
        with pytest.raises(ValueError, match=f"{operator}: {name} must be finite"):
            call(**arguments, validate=validate)
    call(**arguments, validate=False)
    arguments[name][1] = 0.5
    call(**arguments)


@pytest.mark.parametrize("operator", SCHEMAS)
def test_every_operator_looks_at_values_once(operator, monkeypatch):
    call, arguments = cases.PUBLIC[operator], cases.make().arguments(operator)
    call(**arguments)
    monkeypatch.setattr(validation, "_is_plain", lambda tensor: pytest.fail("looked again"))
    call(**arguments)
    others = [name for name in ("query", "encodings", "hidden_states", "outputs") if name in arguments and operator != "concept_gates"]
    call(**arguments | {name: arguments[name].clone() for name in others})  # values nobody looks at


def test_asked_for_it_is_made_in_every_call_and_refused_never(counted):
    run, calls = counted
    x = torch.zeros(2)
    for validate, made in ((True, 1), (None, 2), (True, 3), (True, 4), (None, 4), (False, 4)):
        run(x, validate=validate)
        assert len(calls) == made
    x.data.sub_(1)  # not seen, as the docstring says
    run(x)
    with pytest.raises(ValueError, match="negative"):
        run(x, validate=True)


def test_an_id_that_another_tensor_got_is_no_pass(counted, monkeypatch):
    run, calls = counted
    monkeypatch.setattr(validation, "id", lambda tensor: 1, raising=False)
    x, y = torch.zeros(2), torch.zeros(2)
    for tensor in (x, x, y, y, x):
        run(tensor)
    assert len(calls) == 3
    del x, tensor, calls[:]
    run(-torch.zeros(2))
    assert len(calls) == 1


def test_no_tensor_is_kept_alive(counted):
    run, calls = counted
    x = torch.zeros(2)
    run(x)
    alive = ref(x)
    del calls[:], x
    assert len(validation._passed) == 1 and alive() is None


def test_memory_is_bounded(counted, monkeypatch):
    run, calls = counted
    monkeypatch.setattr(validation, "REMEMBERED", 3)
    tensors = [torch.zeros(2) for _ in range(10)]
    for x in tensors:
        run(x)
        assert len(validation._passed) <= 3
    run(tensors[-1])
    assert len(calls) == 10


def test_inference_tensors_are_checked_in_every_call(counted):
    run, calls = counted
    with torch.inference_mode():
        x = torch.zeros(2)
    for _ in range(3):
        run(torch.zeros(2), x)
    assert len(calls) == 3 and not validation._passed
    with torch.inference_mode():
        x.sub_(1)
    with pytest.raises(ValueError, match="negative"):
        run(x)


def test_what_is_not_plain_is_neither_checked_nor_remembered(counted):
    run, calls = counted
    x = torch.zeros(2)
    with FakeTensorMode():
        fake = torch.zeros(2)
    for other in (fake, x.to("meta"), torch.nested.as_nested_tensor([x], layout=torch.jagged)):
        run(other)
        run(x, others=(other,))

    def called(x):
        run(x)
        return x.sum()

    for transform in (torch.func.functionalize, torch.func.vmap, torch.func.grad, partial(torch.compile, fullgraph=True, backend="eager")):
        transform(called)(torch.zeros(2, 2))
    assert not calls and not validation._passed


def test_a_write_during_the_check_counts_as_one_after_it():
    calls = []

    def check(operator, x):
        calls.append(x)
        thread = Thread(target=x.add_, args=(1,))
        thread.start()
        thread.join()

    x = torch.zeros(2)
    for made in (1, 2):
        validation.check_values(check, "call", None, (x,), (x,))
        assert len(calls) == made


def recognised(module):
    x, y = torch.zeros(2), torch.zeros(2)
    with torch.inference_mode():
        uncounted = torch.zeros(2)
    marks = module.marks((x, y))
    assert module.unchanged((x, y), marks)
    assert not module.unchanged((y, x), marks)
    assert module.marks((x, uncounted)) is None
    y.zero_()
    assert not module.unchanged((x, y), marks)
    assert not module.unchanged((x, torch.zeros(2)), module.marks((x, torch.zeros(2))))


MUTANTS = {
    "versions are not compared": (" or tensor._version != version", ""),
    "identities are not compared": ("alive() is not tensor or ", ""),
    "only the first tensor counts": ("    return True\n", "        return True\n"),
    "any tensor that lives": ("alive() is not tensor", "alive() is None"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name, tmp_path):
    assert_killed(recognised, tensor_version, *MUTANTS[name], tmp_path)
