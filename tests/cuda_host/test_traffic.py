"""DRAM bytes of the kernels over a model of L2: at most 1.1 times the compulsory traffic.

`bench/kernels/traffic_matrix.py` describes the model and writes the page's table, part of which is counted again here.
"""

import pytest
import torch

from bench import roofline
from bench.kernels import traffic_matrix

from ..kernels import cases

LIMIT = 1.1


def line(number, offset=0, size=16, written=False):
    """An access to a line of 128 bytes."""
    return 128 * number + offset, size, written


def test_a_sector_is_fetched_once(built):
    """Sectors of 32 bytes: two halves are one, what lies across two is both."""
    assert built.cached(1024, [line(0, 64), line(0, 80), line(0, 64)], True) == (48, 32, 0)
    assert built.cached(1024, [line(0, 88)], True) == (16, 64, 0)


def test_the_least_recently_used_line_is_evicted(built):
    """Two lines: a third evicts the one that was not used since."""
    a, b, c = map(line, range(3))
    assert built.cached(256, [a, b, a, c, a], True)[1] == 3 * 32
    assert built.cached(256, [a, b, a, c, b], True)[1] == 4 * 32


def test_a_line_is_evicted_from_its_set(built):
    """Two sets of 16: consecutive lines alternate, so 32 stay. Lines at other distances are spread over both by the hash."""
    assert built.cached(32 * 128, [line(i) for i in range(32)] * 2, True)[1] == 32 * 32
    assert built.cached(32 * 128, [line(2 * i) for i in range(24)] * 2, True)[1] <= 30 * 32


def test_a_dirty_sector_is_written_back_once(built):
    """At the end, or when its line is evicted; a store fetches nothing, and later reads hit."""
    store = line(0, written=True)
    assert built.cached(256, [store, line(0, 16, written=True), line(0, size=32)], False) == (64, 0, 0)
    assert built.cached(256, [store, line(0, 16, written=True), line(0, size=32)], True) == (64, 0, 32)
    assert built.cached(128, [store, line(1), store], True) == (48, 32, 64)


@pytest.mark.parametrize("operator", ("concept_gates", "edited_projection", "edited_attention", "fused_edited_attention"))
def test_blocks_that_run_at_once_give_the_same_bits(host, operator):
    case = cases.make(B=3, T=77, D=72, J=2, H=2, d=40, N=129, channels=88, dtype=torch.float16)
    arguments = case.arguments(operator)
    alone = getattr(host, operator)(**arguments)
    host.configure(cache=1 << 16)
    together = getattr(host, operator)(**arguments)
    assert all(map(torch.equal, *((x,) if torch.is_tensor(x) else x for x in (alone, together))))


@pytest.mark.parametrize("chip", traffic_matrix.CHIPS)
def test_gates_of_many_places_write_their_workspace_once(host, chip):
    """Later reads of it hit L2: DRAM bytes are the operator's compulsory ones plus the workspace once."""
    arguments = cases.make(B=1, T=33, D=320, J=130, S=131, dtype=torch.float16, full=True).arguments("concept_gates")
    host.configure(**vars(traffic_matrix.CHIPS[chip]))
    host.concept_gates(**arguments)
    [(_, read, written)] = host.counted()["traffic"]
    assert read + written <= LIMIT * (roofline.of("concept_gates", arguments).bytes + host.workspace_bytes("concept_gates", **arguments))


def test_every_launch_of_the_table_moves_at_most_a_tenth_more():
    table = traffic_matrix.committed()
    assert len(table) == 6 * len(roofline.UNETS) + 2 * sum(map(len, roofline.UNETS.values()))
    assert all(dram <= LIMIT for chips in table.values() for _, dram in chips.values())


def counted_again(host):
    """The cells of the smallest layer on both chips, and of a whole model's text and another layer on the one with the small cache."""
    layers, D = roofline.UNETS["sd15"], roofline.TEXT_WIDTHS["sd15"]
    for chip in traffic_matrix.CHIPS:
        yield from traffic_matrix.layer_cells(host, chip, layers[3], D)
    yield from traffic_matrix.layer_cells(host, "A10", layers[2], D)
    yield from traffic_matrix.model_cells(host, "A10", D, sum(layer.count * layer.C for layer in layers))


def test_the_committed_table_is_of_these_kernels(host):
    """The remedy: python bench/kernels/traffic_matrix.py."""
    table = traffic_matrix.committed()
    for cell in counted_again(host):
        requested, dram = table[cell.case, cell.launch][cell.chip]
        assert cell.l2_requests / cell.least == pytest.approx(requested, abs=6e-4), cell
        assert cell.dram_bytes / cell.least == pytest.approx(dram, abs=0.01), cell  # tensors' addresses decide which lines they share
