"""`ConceptBank`: fixed storage, slots, and what it refuses."""

import re

import pytest
import torch

from perfusion_kernels import ConceptBank, concept_gates, edited_projection, metric

from . import cases

D, O = 12, 20
C = cases.covariance(D)
TABLES = ("targets", "metric_targets", "superclasses", "value_outputs", "value_targets", "key_outputs", "key_targets")


def concept(seed=0, keys=True):
    generator = torch.Generator().manual_seed(seed)
    target, superclass = torch.randn(2, D, generator=generator)
    rows = {
        "target": target,
        "metric_target": metric.metric_targets(target, C),
        "superclass": superclass,
        "value_output": torch.randn(O, generator=generator),
        "value_target": torch.randn(O, generator=generator),
    }
    if keys:
        rows |= {name: torch.randn(O, generator=generator) for name in ("key_output", "key_target")}
    return rows


@pytest.fixture
def bank():
    return ConceptBank(3, D, O, key_dim=O)


def refuses(message):
    return pytest.raises(ValueError, match=re.escape(f"ConceptBank: {message}"))


def test_rows_are_what_was_added(bank):
    rows = concept()
    assert bank.add("cat", **rows) == 0 and bank.add(**concept(1)) == 1
    assert len(bank) == 2 and list(bank) == [0, 1] and "cat" in bank and 1 in bank and "dog" not in bank
    assert bank.slot("cat") == 0 and repr(bank) == "ConceptBank(2 of 3 slots: 'cat', slot 1)"
    for table, argument in zip(TABLES, ("target", "metric_target", "superclass", *list(rows)[3:])):
        assert torch.equal(getattr(bank, table)[0], rows[argument]), table


def test_storage_never_moves(bank):
    before = {name: getattr(bank, name) for name in TABLES}
    addresses = {name: table.data_ptr() for name, table in before.items()}
    bank.add("cat", **concept())
    bank.add("dog", **concept(1))
    bank.replace("cat", **concept(2))
    bank.remove("dog")
    bank.add("bird", **concept(3))
    for name, table in before.items():
        assert getattr(bank, name) is table and table.data_ptr() == addresses[name]


def test_free_slots_are_used_again_lowest_first(bank):
    for seed, name in enumerate("abc"):
        bank.add(name, **concept(seed))
    bank.remove("c")
    bank.remove("a")
    assert not any(getattr(bank, table)[0].any() for table in TABLES)
    assert [bank.add("d", **concept(3)), bank.add("a", **concept(4))] == [0, 2]


def test_index_pads_and_takes_names_and_slots(bank):
    for seed, name in enumerate("abc"):
        bank.add(name, **concept(seed))
    index = bank.index([[], ["c", 0], [1]])
    assert index.dtype == torch.int32 and index.tolist() == [[-1, -1], [2, 0], [1, -1]]
    assert bank.index([["a"]], width=4).tolist() == [[0, -1, -1, -1]]
    assert bank.index([[], []]).shape == (2, 0) and bank.index([], width=3).shape == (0, 3)


def test_serves_the_operators():
    """A batch of rows with nothing, one and two concepts, from a half-precision bank in an empty slot's company."""
    bank = ConceptBank(4, D, O, dtype=torch.float16)
    assert bank.targets.dtype == torch.float32 and bank.value_outputs.dtype == torch.float16
    assert bank.key_outputs is None and bank.key_targets is None
    for seed in range(2):
        bank.add(**concept(seed, keys=False))
    index = bank.index([[], [1], [0, 1]])
    e, W = torch.randn(3, 7, D, dtype=torch.float16), torch.randn(O, D, dtype=torch.float16)
    bias, temperature = torch.full(index.shape, 0.6), torch.full(index.shape, 0.15)
    gates, a = concept_gates(e, bank.targets, bank.metric_targets, index, bias, temperature)
    result = edited_projection(e, W, gates, a, index, bank.value_outputs, bank.value_targets)
    assert torch.equal(result[0], torch.nn.functional.linear(e, W)[0]) and torch.isfinite(result).all()


def test_index_refusals(bank):
    bank.add("cat", **concept())
    bank.add("dog", **concept(1))
    copy = concept(2) | {"target": 2 * concept()["target"], "metric_target": 2 * concept()["metric_target"]}
    bank.add("cat again", **copy)
    with refuses("no concept 'bird' here (removed, or never added); it holds 'cat', 'dog', 'cat again'"):
        bank.index([["bird"]])
    with refuses("no concept 3 here"):
        bank.index([[3]])
    with refuses("a row may use a concept once; 'dog' appears again"):
        bank.index([["dog", "cat", 1]])
    with refuses("a row uses 2 concepts, more than the width of 1"):
        bank.index([["cat", "dog"]], width=1)
    with refuses("'cat', 'cat again' cannot share a prompt: they are copies of each other or nearly so"):
        bank.index([["cat", "dog"], ["cat", "dog", "cat again"]])
    bank.remove("dog")
    with refuses("no concept 1 here (removed, or never added)"):
        bank.index([[1]])


def test_what_index_remembers_is_forgotten_on_change(bank):
    bank.add("cat", **concept())
    bank.add("dog", **concept(1))
    bank.index([["cat", "dog"]])
    bank.replace("dog", **concept())
    with refuses("'cat', 'dog' cannot share a prompt"):
        bank.index([["cat", "dog"]])


def test_add_refusals_change_nothing(bank):
    bank.add("cat", **concept())
    good = concept(1)
    before = {name: getattr(bank, name).clone() for name in TABLES}
    for changes, message in (
        ({"target": torch.ones(D + 1)}, f"target of 'dog' must have shape [{D}]; got [{D + 1}]"),
        ({"value_output": torch.ones(1, O)}, f"value_output of 'dog' must have shape [{O}]; got [1, {O}]"),
        ({"superclass": torch.full((D,), torch.nan)}, "superclass of 'dog' must be finite in torch.float32"),
        (
            {"metric_target": -good["metric_target"]},
            "the energy target · metric_target of 'dog' must be positive; got -",
        ),
        ({"metric_target": torch.zeros(D)}, "the energy target · metric_target of 'dog' must be positive; got 0"),
        ({"key_output": None}, "key_output of 'dog' must be given; got None"),
    ):
        with refuses(message):
            bank.add("dog", **{**good, **changes})
    with refuses("slot 0 has the name 'cat'; replace or remove it"):
        bank.add("cat", **good)
    assert len(bank) == 1 and all(torch.equal(getattr(bank, name), table) for name, table in before.items())
    bank.add(**good)
    bank.add(**concept(2))
    with refuses("all 3 slots are in use; remove one or make a larger bank"):
        bank.add("bird", **concept(3))


def test_rows_must_be_finite_in_the_bank_s_dtype():
    bank = ConceptBank(1, D, O, dtype=torch.float16)
    with refuses("value_output of 'cat' must be finite in torch.float16"):
        bank.add("cat", **{**concept(keys=False), "value_output": torch.full((O,), 7e4)})
    with refuses("key_output of 'cat' must not be given: the bank has no key tables"):
        bank.add("cat", **concept())


def test_replace_keeps_what_is_not_given(bank):
    bank.add("cat", **concept())
    output = torch.ones(O)
    bank.replace("cat", value_output=output)
    assert torch.equal(bank.value_outputs[0], output) and torch.equal(bank.targets[0], concept()["target"])
    with refuses("target and metric_target of 'cat' must be replaced together"):
        bank.replace("cat", target=torch.ones(D))
    with refuses("no concept 'dog' here"):
        bank.replace("dog", value_output=output)


def test_projected_targets_may_be_left_out_and_show_it(bank):
    """Never stale, never zero: rows that nobody computed are NaN, with a new target too."""
    complete = concept()
    partial = {name: row for name, row in concept(1).items() if name not in ("value_target", "key_target")}
    bank.add("cat", **complete)
    bank.add("dog", **partial)
    assert bank.value_targets[1].isnan().all() and bank.key_targets[1].isnan().all()
    bank.replace("dog", value_output=torch.ones(O))
    assert bank.value_targets[1].isnan().all()
    bank.replace("cat", target=partial["target"], metric_target=partial["metric_target"])
    assert bank.value_targets[0].isnan().all() and torch.equal(bank.value_outputs[0], complete["value_output"])
    bank.replace("cat", value_target=complete["value_target"])
    assert torch.equal(bank.value_targets[0], complete["value_target"])


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(capacity=0, encoding_dim=1, value_dim=1), "capacity must be at least 1; got 0"),
        (dict(capacity=1, encoding_dim=1, value_dim=0), "value_dim must be at least 1; got 0"),
        (dict(capacity=1, encoding_dim=1, value_dim=1, key_dim=0), "key_dim must be at least 1, or None"),
        (dict(capacity=1, encoding_dim=1, value_dim=1, dtype=torch.int8), "dtype must be float16, bfloat16"),
    ],
)
def test_size_refusals(sizes, message):
    with refuses(message):
        ConceptBank(**sizes)


def test_a_bank_made_in_inference_mode_can_be_written_outside():
    with torch.inference_mode():
        bank = ConceptBank(1, D, O)
        bank.add("cat", **concept(keys=False))
    bank.replace("cat", value_output=torch.ones(O))
