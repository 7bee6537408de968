"""The operators' C++ for torch, over the kernels that run on the CPU: torch tensors go in and come out, or are refused.

csrc/torch is compiled as for a GPU, but for the device guard and the stream, and registered as `<operator>.host`.
"""

import ctypes
import importlib

import pytest
import torch

from perfusion_kernels.cuda import OPERATORS, library
from perfusion_kernels.registration import bind, bind_backward

from ..kernels import cases
from .build import build_torch_library


@pytest.fixture(scope="session")
def path():
    return build_torch_library()


@pytest.fixture(scope="session")
def operators(path):
    torch.ops.load_library(str(path))
    return {name: bind(importlib.import_module(f"perfusion_kernels.{name}").OPERATOR, "host", None) for name in OPERATORS}


NAMES = [argument.name for argument in cases.overload_of("edited_projection")._schema.arguments]


def made(name, **sizes):
    """A case whose dtypes the kernels of this operator take."""
    dtype = torch.float32 if name == "concept_gates" else torch.bfloat16
    return cases.make(**{"T": 13, "d": 32, "H": 2, "N": 5, "D": 16, "J": 3, "dtype": dtype, **sizes})


def results(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("views", (False, True))
@pytest.mark.parametrize("name", OPERATORS)
def test_the_operator_gives_the_bits_of_the_c_function(operators, host, name, views):
    arguments = made(name, views=views).arguments(name)
    expected = results(getattr(host, name)(**arguments))
    found = results(operators[name](*cases.positional(name, arguments)))
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected):
        assert mine.is_contiguous() and mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def test_derivatives_of_empty_batches_and_wrong_shapes(operators):
    backward = bind_backward(importlib.import_module("perfusion_kernels.edited_projection").OPERATOR, "host", None)
    empty = made("edited_projection", B=0).arguments("edited_projection")
    gradient = torch.zeros(0, 13, 64, dtype=torch.bfloat16)
    (by_outputs,) = backward(gradient, *cases.positional("edited_projection", empty), [name == "outputs" for name in NAMES])
    assert by_outputs.shape == empty["outputs"].shape and not by_outputs.any()
    arguments = cases.positional("edited_projection", made("edited_projection").arguments("edited_projection"))
    gradient = torch.zeros(4, 13, 64, dtype=torch.bfloat16)
    for wrong, needs, message in (
        (gradient[:, 1:], [1, 0, 0, 0, 0, 0, 0], r"encodings must have shape \[4, 12, 16\]; got \[4, 13, 16\]"),
        (gradient, [0, 1, 0, 0, 0, 0, 0], "there are no derivatives of weight and index here"),
        (gradient, [1], "needs must have 7 values; got 1"),
    ):
        with pytest.raises(RuntimeError, match=f"edited_projection_backward: {message}"):
            backward(wrong, *arguments, [bool(need) for need in needs])


def test_absent_tensors(operators, host):
    """None is an absent edit; a table without slots, and an index without places, are not."""
    case = made("edited_attention")
    arguments = case.arguments("edited_attention")
    plain = dict.fromkeys(arguments) | {key: arguments[key] for key in ("query", "key", "value")}
    expected = host.edited_attention(**plain)
    call = operators["edited_attention"]
    assert torch.equal(call(*cases.positional("edited_attention", plain)), expected)
    no_slots = {key: x[:0] if key.startswith(("key_", "value_")) else x for key, x in arguments.items()}
    no_slots["index"] = torch.full_like(arguments["index"], -1)
    assert torch.equal(call(*cases.positional("edited_attention", no_slots)), expected)
    no_places = {**arguments, **{key: arguments[key][..., :0] for key in ("gates", "components", "index")}}
    assert torch.equal(call(*cases.positional("edited_attention", no_places)), expected)
    one_side = {**arguments, "key_outputs": None, "key_targets": None}
    assert torch.equal(call(*cases.positional("edited_attention", one_side)), host.edited_attention(**one_side))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("edited_attention", {"key": lambda x: x[:, :, :1]}, r"edited_attention: key must have shape \[4, 13, 2, 32\]; got \[4, 13, 1,"),
        ("edited_attention", {"query": lambda x: x[0]}, r"edited_attention: query must have 4 dimensions; got shape \[5, 2, 32\]"),
        ("edited_attention", {"value": lambda x: x.half()}, "edited_attention: value must be bfloat16; got float16"),
        ("edited_attention", {"gates": lambda x: x.double()}, "edited_attention: gates must be float16, .* int32; got Double"),
        ("edited_attention", {"key_targets": lambda x: None}, "edited_attention: key_targets must be given; got NULL"),
        ("edited_attention", {"index": lambda x: x[:3]}, r"edited_attention: index must have shape \[4, 3\]; got \[3, 3\]"),
        ("edited_projection", {"weight": lambda x: x[:, 1:]}, r"edited_projection: weight must have shape \[64, 16\]; got \[64, 15\]"),
        ("fused_edited_attention", {"encodings": lambda x: x.half()}, "fused_edited_attention: encodings must be bfloat16; got float16"),
        ("concept_gates", {"bias": lambda x: x.half()}, "concept_gates: bias must be float32; got float16"),
        ("concept_gates", {"metric_targets": lambda x: x[1:]}, r"concept_gates: metric_targets must have shape \[6, 16\]; got \[5, 16\]"),
    ],
)
def test_what_python_did_not_check_is_refused(operators, name, changes, message):
    arguments = made(name).arguments(name)
    arguments |= {key: change(arguments[key]) for key, change in changes.items()}
    with pytest.raises(RuntimeError, match=message):
        operators[name](*cases.positional(name, arguments))


@pytest.mark.parametrize("name", OPERATORS)
def test_references_are_returned(operators, name):
    """Arguments are let go, and who has the result is its only owner; after a refusal too."""
    arguments = cases.positional(name, made(name).arguments(name))
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    before = [x._use_count() for x in tensors]
    for result in results(operators[name](*arguments)):
        assert result._use_count() == 1
    with pytest.raises(RuntimeError, match="must have . dimensions"):
        operators[name](*(x[0] if x is tensors[0] else x for x in arguments))
    assert [x._use_count() for x in tensors] == before


def test_the_library_says_what_it_was_compiled_for(operators, path, monkeypatch):
    """Torch would call a kernel with the arguments of any schema; the loader compares before it trusts."""
    loaded = ctypes.CDLL(str(path))
    loaded.perfusion_torch_signatures.restype = ctypes.c_char_p
    signatures = loaded.perfusion_torch_signatures().decode()
    assert {line.split("(")[0] for line in signatures.splitlines()} == {*OPERATORS, "edited_projection_backward", "fused_edited_projection_backward"}
    assert library.outdated(signatures) is None
    other = library.SCHEMAS["edited_attention"].replace("Tensor? gates", "Tensor gates")
    monkeypatch.setitem(library.SCHEMAS, "edited_attention", other)
    assert "was compiled for another version: its edited_attention is (Tensor, Tensor, Tensor, Tensor?" in library.outdated(signatures)
    monkeypatch.delitem(library.SCHEMAS, "edited_attention")
    assert "has an operator edited_attention, which is not one here" in library.outdated(signatures)
