"""The table of choices: what it says at a shape, whose row counts, what becomes of files that are none, and who obeys it."""

import dataclasses
import json
import os

import pytest
import torch

from perfusion_kernels import absorb_where_faster, backend, choices, cross_attention_layer, user_cache

from . import cases, plain
from .test_cuda_backend import gpu, once, registered  # noqa: F401  fixtures
from .tolerance import assert_no_worse

CPU = torch.device("cpu")
LAYER = {"B": 2, "N": 17, "C": 29, "T": 13, "H": 3, "d": 8}  # of cases.make(B=2)
PROJECTION = {"B": 2, "T": 13, "D": 19, "O": 24}


def row(operator="cross_attention_layer", sizes=LAYER, *, ratio=0.5, device="cpu", dtype="float32"):
    outcome = choices.OUTCOMES[operator][ratio > 0.97]
    return choices.Choice(device, operator, dtype, sizes, outcome, ratio, "plain", 20, "2026-01-01T00:00:00+00:00", "2.13.0")


def forget():
    choices.known.cache_clear()
    choices._table.cache_clear()


@pytest.fixture(autouse=True)
def shipped(monkeypatch, tmp_path):
    """A cache folder and a shipped table of the test's own; shipped(*rows) fills the latter."""
    monkeypatch.setenv("PERFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "SHIPPED", tmp_path / "shipped.json")
    forget()

    def ship(*rows):
        choices.SHIPPED.write_text(json.dumps([dataclasses.asdict(each) for each in rows]))
        forget()

    yield ship
    forget()


def said(sizes=LAYER, dtype=torch.float32, operator="cross_attention_layer"):
    return choices.measured(operator, CPU, dtype, tuple(sizes.values()))


# the table


def test_the_table_of_the_package_is_right(monkeypatch):
    monkeypatch.undo()
    rows, reasons = choices.read(choices.SHIPPED)
    assert choices.SHIPPED.exists() and reasons == [] and len({each.key for each in rows}) == len(rows)
    assert "cpu" not in {each.device for each in rows}


def test_only_what_was_measured_is_said(shipped):
    assert said() is None
    shipped(row(), row(sizes={**LAYER, "N": 18}, ratio=1.2), row(sizes={**LAYER, "N": 19}, device="NVIDIA H200"))
    assert (said(), said({**LAYER, "N": 18}), said({**LAYER, "N": 19}), said({**LAYER, "N": 20})) == ("absorbed", "plain", None, None)
    assert said(dtype=torch.float16) is None and said(operator="edited_projection") is None


def test_the_users_own_row_counts_before_the_shipped_one(shipped):
    other = {**LAYER, "B": 5}
    shipped(row(), row(sizes=other))
    choices.keep([row(ratio=1.1)])
    assert (said(), said(other)) == ("plain", "absorbed")


def test_what_was_kept_is_found_again_and_measuring_again_replaces_it(tmp_path):
    choices.keep([row(), row(sizes={**LAYER, "B": 5})])
    choices.keep([row(ratio=1.1), row(device="another GPU")])
    forget()  # as another process begins
    assert (said(), said({**LAYER, "B": 5})) == ("plain", "absorbed")
    names = {file.name for file in (tmp_path / "cache").iterdir()}
    assert len(names) == 2 and all(torch.__version__.split("+")[0] in name for name in names)


# files that are none


DEEP = "[" * 100_000


@pytest.mark.parametrize("text", (b"", b"{}", b"3", b"\xff\xfe", DEEP.encode(), b"[1e999" + b"0" * 9000, b" " * (4 * 2**20) + b"[]"))
def test_a_file_that_is_no_table_is_passed_over_with_a_reason(text):
    file = choices.users("cpu")
    file.parent.mkdir()
    file.write_bytes(text)
    assert said() is None
    (reason,) = choices.known("cpu")[1]
    assert reason.startswith(f"{file} is passed over: ") and len(reason) < 500
    choices.keep([row()])
    assert said() == "absorbed" and choices.known("cpu")[1] == ()


@pytest.mark.parametrize("make", (os.mkdir, os.mkfifo))  # reading a pipe would wait for ever
def test_what_is_no_file_is_passed_over(make):
    file = choices.users("cpu")
    file.parent.mkdir()
    make(file)
    assert said() is None and "must be a file" in choices.known("cpu")[1][0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"operator": "edited_attention"}, "operator must be edited_projection or cross_attention_layer"),
        ({"sizes": {**LAYER, "N": True}}, "sizes must be whole numbers B, N, C, T, H, d"),
        ({"sizes": PROJECTION}, "sizes must be whole numbers B, N, C, T, H, d"),
        ({"sizes": [2] * 6}, "sizes must be whole numbers B, N, C, T, H, d"),
        ({"dtype": "nn"}, "dtype must be float16 or"),
        ({"ratio": float("nan")}, "ratio must be a number above 0"),
        ({"ratio": 10**400}, "ratio must be a number above 0"),
        ({"ratio": -1}, "ratio must be a number above 0"),
        ({"ratio": 0.98}, "choice must be plain, by its ratio"),
        ({"ratio": None}, "choice must be plain, by its ratio"),
        ({"choice": "__import__('os')"}, "choice must be absorbed, by its ratio"),
        ({"rounds": "20"}, "rounds must be a whole number"),
        ({"device": None}, "device must be a text"),
        ({"more": 1}, "it must be an object of device, operator, "),
    ],
)
def test_a_row_that_is_none_is_passed_over_and_the_others_count(change, reason):
    file = choices.users("cpu")
    file.parent.mkdir()
    right = dataclasses.asdict(row(sizes={**LAYER, "B": 5}))
    file.write_text(json.dumps([{**dataclasses.asdict(row()), **change}, right]))
    assert said() is None and said({**LAYER, "B": 5}) == "absorbed"
    assert choices.known("cpu")[1][0].startswith(f"row 0 of {file} is passed over: {reason}")


@pytest.mark.parametrize("rows", (3, None, [3], [[]]))
def test_json_that_holds_no_rows_is_passed_over(rows):
    file = choices.users("cpu")
    file.parent.mkdir()
    file.write_text(json.dumps(rows))
    assert said() is None and "is passed over: it must " in choices.known("cpu")[1][0]


# under torch.compile


@pytest.mark.parametrize("dynamic", (False, True, None))
def test_a_compiled_function_asks_without_a_graph_break(shipped, dynamic):
    shipped(row(), row(sizes={**LAYER, "B": 4}, ratio=1.5))

    def ask(x):
        found = choices.measured("cross_attention_layer", x.device, x.dtype, (x.shape[0], 17, 29, 13, 3, 8))
        return x + {"absorbed": 1, "plain": 2, None: 3}[found]

    torch._dynamo.reset()
    compiled = torch.compile(ask, fullgraph=True, backend="eager", dynamic=dynamic)
    assert [compiled(torch.zeros(B))[0].item() for B in (2, 4, 5, 7, 2)] == [1, 2, 3, 3, 1]


# who obeys: backend="measured"


@pytest.fixture
def projection(registered, gpu, monkeypatch):  # noqa: F811
    """The backend that a call of `edited_projection` on a GPU takes."""
    monkeypatch.setattr(user_cache, "kind", lambda device: f"a {device.type}")

    def taken(asked=None, gradients=False, **case):
        arguments = gpu(cases.make(**{"B": 2, "dtype": torch.half, **case}).arguments("edited_projection"))
        if gradients:
            arguments["encodings"].requires_grad_()
        return backend.select("edited_projection", cases.positional("edited_projection", arguments), asked)._overloadname

    return taken


def win(**options):
    return row("edited_projection", PROJECTION, device="a cuda", dtype="float16", **options)


def test_nothing_but_a_win_takes_the_compiled_product(projection, shipped):
    usual = projection()
    assert usual != "cuda" and projection("measured") == usual and projection("cuda") == "cuda"
    shipped(win(ratio=1.2))
    assert projection("measured") == usual
    shipped(win())
    assert projection("measured") == "cuda"
    assert projection("measured", B=3) == projection("measured", dtype=torch.bfloat16) == usual


def test_a_win_changes_no_call_that_did_not_ask(projection, shipped):
    """The bits of a row without a concept are promised to be the library's."""
    shipped(win())
    assert projection() == projection("auto") != "cuda"
    with backend.use_backend("measured"):
        assert projection() == "cuda" and projection("auto") != "cuda"


def test_the_number_of_concepts_is_not_asked(projection, shipped):
    """A row without a concept has the same bits, whatever the others have."""
    shipped(win())
    assert {projection("measured", J=J) for J in (0, 1, 5)} == {"cuda"}


def test_a_call_that_will_be_differentiated_stays(projection, shipped):
    shipped(win())
    assert projection("measured", gradients=True) != "cuda"
    with torch.no_grad():
        assert projection("measured", gradients=True) == "cuda"


def test_a_win_does_not_make_a_kernel_take_what_it_refuses(projection, shipped):
    shipped(dataclasses.replace(win(), dtype="float32"))
    assert projection("measured", dtype=torch.float32) != "cuda"


def test_a_compiled_function_takes_it(projection, shipped, gpu):  # noqa: F811
    shipped(win())
    arguments, graphs = gpu(cases.make(B=2, dtype=torch.half).arguments("edited_projection")), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    call = torch.compile(lambda x: cases.PUBLIC["edited_projection"](**x, backend="measured"), fullgraph=True, backend=keep)
    assert call(arguments).shape == (2, 13, 24)
    own = [node.target for node in graphs[0].graph.nodes if "perfusion_kernels" in str(node.target)]
    assert own == [cases.overload_of("edited_projection", "cuda")]


def test_why_it_is_not_taken_unasked(registered):  # noqa: F811
    arguments = cases.positional("edited_projection", cases.make().arguments("edited_projection"))
    reason = backend._implementations["edited_projection"]["cuda"].declines(*arguments)
    assert "promised the bits of the library's product" in reason and 'backend="measured"' in reason


# who obeys: absorb_where_faster


WEIGHTS = ("query_weight", "key", "value", "output_weight")


@pytest.mark.parametrize("ratio", (None, 1.2, 0.98, 0.9))
@pytest.mark.parametrize("scale", (None, 0.4))
def test_the_layer_of_two_rows_in_the_faster_form(shipped, ratio, scale):
    if ratio is not None:
        shipped(row(ratio=ratio))
    case = cases.make(B=2)
    arguments = case.arguments("cross_attention_layer")
    form = absorb_where_faster(*(arguments[name] for name in WEIGHTS), image_tokens=17, scale=scale)
    absorbed = ratio is not None and ratio < 0.97
    assert (form["query_weight"] is None, form["output_weight"] is None, form["scale"] == 1) == (absorbed,) * 3
    assert (form["key"] is arguments["key"]) != absorbed
    result = cross_attention_layer(**{**arguments, **form})
    exact, naive = (
        plain.cross_attention_layer(*cases.positional("cross_attention_layer", each.arguments("cross_attention_layer"), scale or 8**-0.5))
        for each in (case.double(), case)
    )
    assert_no_worse(result, naive, exact, case.index)


def test_a_layer_of_another_size_stays_plain(shipped):
    shipped(row())
    arguments = cases.make(B=2).arguments("cross_attention_layer")
    for tokens, absorbed in ((17, True), (18, False)):
        form = absorb_where_faster(*(arguments[name] for name in WEIGHTS), image_tokens=tokens)
        assert (form["query_weight"] is None) == absorbed


def test_a_layer_that_will_be_differentiated_stays_plain(shipped):
    shipped(row())
    arguments = cases.make(B=2).arguments("cross_attention_layer")
    arguments["value"].requires_grad_()
    assert absorb_where_faster(*(arguments[name] for name in WEIGHTS), image_tokens=17)["query_weight"] is not None
    with torch.no_grad():
        assert absorb_where_faster(*(arguments[name] for name in WEIGHTS), image_tokens=17)["query_weight"] is None


def test_its_refusals_name_it():
    arguments = cases.make(B=2).arguments("cross_attention_layer")
    with pytest.raises(ValueError, match=r"absorb_where_faster: output_weight must have shape \[C, H\*d\]"):
        absorb_where_faster(*(arguments[name] for name in WEIGHTS[:3]), arguments["output_weight"][1:], image_tokens=17)
