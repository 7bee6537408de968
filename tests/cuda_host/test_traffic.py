"""What of a kernel's accesses reaches device memory, over a model of the second-level cache: at most 1.1 times the least, with two
exceptions on the chip with the smallest cache.

`bench/kernels/traffic_matrix.py` says how, and writes the page's table, of which a part is counted again here.
"""

import pytest
import torch

from bench import floors
from bench.kernels import traffic_matrix

from ..kernels import cases

LIMIT = 1.1
TOO_WIDE = ("N = 576, C = 1280, d = 64, D = 1024", "N = 1024, C = 1280, d = 64, D = 2048")  # for 6 MiB, as the page says


def test_a_cache_brings_a_sector_once(built):
    """Sectors of 32 bytes: two halves are one, what lies across two is both."""
    assert built.cached(1024, [(64, 16, False), (80, 16, False), (64, 16, False)], True) == (48, 32, 0)
    assert built.cached(1024, [(88, 16, False)], True) == (16, 64, 0)


def test_what_was_used_longest_ago_makes_room(built):
    """Two lines of 128 bytes: a third drives out the one that was not used since."""
    a, b, c = ((128 * i, 16, False) for i in range(3))
    assert built.cached(256, [a, b, a, c, a], True)[1] == 3 * 32
    assert built.cached(256, [a, b, a, c, b], True)[1] == 4 * 32


def test_what_is_written_goes_to_memory_once(built):
    """In the end, or when its line makes room; it brings nothing, and is there to be read."""
    store, other = (0, 16, True), (128, 16, False)
    assert built.cached(256, [store, (16, 16, True), (0, 32, False)], False) == (64, 0, 0)
    assert built.cached(256, [store, (16, 16, True), (0, 32, False)], True) == (64, 0, 32)
    assert built.cached(128, [store, other, store], True) == (48, 32, 64)


@pytest.mark.parametrize("operator", ("concept_gates", "edited_projection", "edited_attention", "fused_edited_attention", "cross_attention_layer"))
def test_blocks_that_run_at_once_give_the_same_bits(host, operator):
    case = cases.make(B=3, T=77, D=72, J=2, H=2, d=40, N=129, channels=88, dtype=torch.float16)
    arguments = case.arguments(operator)
    alone = getattr(host, operator)(**arguments)
    host.configure(cache=1 << 16)
    together = getattr(host, operator)(**arguments)
    assert all(map(torch.equal, *((x,) if torch.is_tensor(x) else x for x in (alone, together))))


def test_every_launch_of_the_table_moves_at_most_a_tenth_more():
    table = traffic_matrix.committed()
    assert len(table) >= 6 * len(floors.UNETS) + 4 * sum(map(len, floors.UNETS.values()))
    over = {(row, chip) for row, chips in table.items() for chip, (_, moved) in chips.items() if moved > LIMIT}
    assert over == {((shape, "cross_attention_layer, project"), "A10") for shape in TOO_WIDE}


def counted_again(host):
    """The cells of the smallest layer on both chips, and of a whole model's text and another layer on the one with the small cache."""
    layers, D = floors.UNETS["sd15"], floors.TEXT_WIDTHS["sd15"]
    for chip in traffic_matrix.CHIPS:
        yield from traffic_matrix.layer_cells(host, chip, layers[3], D)
    yield from traffic_matrix.layer_cells(host, "A10", layers[2], D)
    yield from traffic_matrix.model_cells(host, "A10", D, sum(layer.count * layer.C for layer in layers))


def test_the_committed_table_is_of_these_kernels(host):
    """The remedy: python bench/kernels/traffic_matrix.py."""
    table = traffic_matrix.committed()
    for cell in counted_again(host):
        asked, moved = table[cell.case, cell.launch][cell.chip]
        assert cell.asked / cell.least == pytest.approx(asked, abs=6e-4), cell
        assert cell.moved / cell.least == pytest.approx(moved, abs=0.01), cell  # where tensors begin decides which lines they share
