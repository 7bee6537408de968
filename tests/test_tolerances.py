"""One policy for numbers that are computed: `tests/kernels/tolerance.py`, and nothing beside it.

A test that compares by it is marked `numeric`, so that it runs as on other processors, or `proof`, which takes minutes. Numeric tests, and
what their files share, have no other tolerance. What is no matter of a processor's roundings keeps its own, in tests of its own:

- what a file keeps: the short floats of a saved concept, numbers of JSON and of a command's tables
- pictures of 8 bits: masks, crops, resized pictures
- memory, times, counts of operations and of launches, which are reckoned or measured
- how well something was learned or drawn: a score, a similarity, a peak signal-to-noise ratio
- what toybox renders and judges, the pictures of the lab, and other programs beside ours (ComfyUI): numbers of about 1, to 1e-3 to 1e-6
- that two things differ: `not torch.allclose(…)`, by far more than any rounding
- finite differences, whose own error is larger
"""

import ast
import os
from pathlib import Path

import pytest
import torch

from perfusion_kernels import edited_projection
from tests.kernels import cases
from tests.kernels.tolerance import as_run, exactly

TESTS = Path(__file__).parent
POLICY = {"assert_agree", "assert_close", "assert_no_worse", "assert_rounded_once", "assert_same_run"}
SHARED = {"check_rows"}  # of tests/perfusion/editing.py, by the policy
OTHERS = {"allclose", "approx", "assert_allclose", "isclose"}


@pytest.fixture(scope="module")
def files():
    return {path.relative_to(TESTS).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(TESTS.rglob("test_*.py"))}


def functions(tree):
    return [each for each in tree.body if isinstance(each, ast.FunctionDef)]


def marks(tree):
    """Test -> the markers that it has of its own or by its file."""
    of_file = [each.value for each in tree.body if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "pytestmark"]
    for function in functions(tree):
        if function.name.startswith("test_"):
            text = " ".join(map(ast.unparse, [*of_file, *function.decorator_list]))
            yield function, {mark for mark in ("numeric", "proof") if f"pytest.mark.{mark}" in text}


def names(function):
    return {each.id for each in ast.walk(function) if isinstance(each, ast.Name)} | {each.arg for each in function.args.args}


def comparing(tree):
    """Functions of a file that compare by the policy, themselves or by another function or fixture of it."""
    mentioned, found, before = {each.name: names(each) for each in functions(tree)}, set(), None
    while found != before:
        before = set(found)
        found |= {name for name, others in mentioned.items() if others & (POLICY | SHARED | found)}
    return found


def other_tolerances(node, denied=False):
    """Calls, and comparisons with a small number, that bring a tolerance of their own."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            name = ast.unparse(child.func)
            given = {each.arg: each.value for each in child.keywords}
            none = all(isinstance(given.get(each), ast.Constant) and given[each].value == 0 for each in ("rtol", "atol"))
            of_torch = name.endswith("testing.assert_close")
            if not none and (of_torch or name.split(".")[-1] in OTHERS and not denied or not denied and {"rtol", "atol"} & given.keys()):
                yield child
        if isinstance(child, ast.Compare) and any(isinstance(each, (ast.Lt, ast.LtE)) for each in child.ops):
            bounds = (each.value for bound in child.comparators for each in ast.walk(bound) if isinstance(each, ast.Constant))
            if any(isinstance(each, float) and 0 < each < 0.01 for each in bounds):
                yield child
        yield from other_tolerances(child, isinstance(child, ast.UnaryOp) and isinstance(child.op, ast.Not))


def test_what_compares_numbers_is_numeric(files):
    unmarked = []
    for file, tree in files.items():
        compared = comparing(tree)
        unmarked += [f"{file}::{test.name}" for test, marked in marks(tree) if test.name in compared and not marked]
    assert not unmarked, "\n".join(unmarked)


def test_numeric_tests_have_no_other_tolerance(files):
    found = []
    for file, tree in files.items():
        marked = {test.name: marked for test, marked in marks(tree)}
        for each in tree.body:
            name = getattr(each, "name", "")
            if any("numeric" in marked.get(test, ()) for test in ([name] if name.startswith("test_") else marked)):
                found += [f"{file}::{name}: {ast.unparse(call)}" for call in other_tolerances(each)]
    assert not found, "\n".join(found)


def test_what_is_looked_for_is_found():
    """Each of these lines is a tolerance, or none."""
    for line, count in {
        "torch.testing.assert_close(a, b)": 1,
        "torch.testing.assert_close(a, b, rtol=0, atol=0)": 0,
        "torch.testing.assert_close(a, b, rtol=0, atol=1e-6)": 1,
        "assert not torch.allclose(a, b, atol=1e-3)": 0,
        "assert torch.allclose(a, b)": 1,
        "assert (a - b).abs().max() < 1e-3 * b.norm()": 1,
        "assert 0 < a < 1 and a <= bound": 0,
        "assert a == pytest.approx(b)": 1,
        "near = dict(atol=1e-4, rtol=1e-3)": 1,
        "assert_close(a, exact)": 0,
    }.items():
        assert len(list(other_tolerances(ast.parse(line)))) == count, line


def test_a_scale_does_not_vanish_where_terms_cancel():
    """In a sum, in an operator of the package, and in a model's own dtype."""
    case = cases.make(J=1, dtype=torch.float64)
    target, index = case.targets[None, 1:2], torch.ones(1, 1, dtype=torch.int32)
    nothing, all_of_it = torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1).double()
    numbers = torch.linspace(1, 2, 50, dtype=torch.float64)[:, None]
    terms = torch.cat([numbers, -numbers])
    (total,) = exactly(lambda: terms.sum(0))
    (removed,) = exactly(lambda: edited_projection(target, case.value_weight, nothing, all_of_it, index, case.value_outputs, case.value_targets))
    run = as_run(lambda: terms.float().sum(0))
    for each in (total, run):
        assert abs(each.value) < 1e-5 and 1 < each.scale < 200
    assert removed.value.abs().max() < 1e-12 and removed.scale.max() > 0.1 * case.value_targets[1].abs().max()


@pytest.mark.numeric
def test_torch_runs_as_the_processor_that_is_asked_for():
    """Else `make numeric` would be the same run several times: torch reads the variable once, when it is loaded."""
    runs_as = torch.backends.cpu.get_cpu_capability().lower()
    assert os.environ.get("ATEN_CPU_CAPABILITY", runs_as) == runs_as
