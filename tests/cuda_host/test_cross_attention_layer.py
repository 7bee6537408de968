"""The CUDA source of `cross_attention_layer`, plain and absorbed, run on the CPU, against the plain formula.

What mutants are killed by stands in functions `check_…(host)`: test_mutants.py calls them with a changed library.
"""

import pytest
import torch

from bench import floors
from perfusion_kernels import absorb_projections

from ..kernels import cases, plain
from ..kernels.tolerance import assert_no_worse
from .host import Refused, compare

HALVES = (torch.float16, torch.bfloat16)
WIDTHS = (32, 40, 64, 80, 96, 128, 160)
OPERATOR = "cross_attention_layer"


def small(T=77, d=40, N=17, H=2, channels=72, dtype=torch.float16, **sizes):
    return cases.make(T=T, D=11, d=d, N=N, H=H, channels=channels, dtype=dtype, **sizes)


def layer(case):
    return case.arguments(OPERATOR)


def absorbed(case, scale=0.3):
    """The same layer's arguments with its projections absorbed."""
    arguments = layer(case)
    names = ("query_weight", "key", "value", "output_weight")
    key, value = absorb_projections(*(arguments[name] for name in names), scale=scale)
    return {**arguments, "query_weight": None, "key": key, "value": value, "output_weight": None}


def run(host, arguments, **options):
    """With the scale of the tests, which absorbed keys contain."""
    return host.cross_attention_layer(**arguments, scale=0.3 if arguments["query_weight"] is not None else 1.0, **options)


def compare_absorbed(host, case):
    """No worse than the formula of the layer that is not absorbed, which is what absorption stands for."""
    actual = run(host, absorbed(case))
    naive, exact = (plain.cross_attention_layer(**layer(each), scale=0.3) for each in (case, case.double()))
    assert_no_worse(actual, naive, exact, case.index)


def compare_both(host, case):
    compare(host, OPERATOR, case)
    compare_absorbed(host, case)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("d", WIDTHS)
def test_every_head_width(host, d, dtype):
    compare(host, OPERATOR, small(d=d, dtype=dtype, seed=d, B=2, N=5, H=1))


@pytest.mark.parametrize("T", (1, 16, 77, 80, 81, 154, 231, 256))
def test_context_lengths(host, T):
    compare_both(host, small(T=T, dtype=HALVES[T % 2], seed=T, B=2, H=1, N=5))


@pytest.mark.parametrize("d, T", [(160, 231), (96, 154)])
def test_long_contexts_of_wide_heads(host, d, T):
    compare(host, OPERATOR, small(d=d, T=T, H=1, B=2, N=5))


@pytest.mark.parametrize("channels", (1, 7, 8, 40, 64, 65, 136, 200))
def test_any_number_of_channels(host, channels):
    """Below a tile, a tile, several; rows that are and that are not a multiple of 16 bytes."""
    compare_both(host, small(channels=channels, dtype=HALVES[channels % 2], seed=channels, B=2, N=5, T=20, d=32))


@pytest.mark.parametrize("sizes", [dict(B=1, N=1, H=1, T=5), dict(B=5, N=33, H=3, T=79), dict(B=3, N=64, H=2, T=17), dict(B=1, N=65)])
def test_odd_sizes(host, sizes):
    compare_both(host, small(**sizes))


def check_many_tiles(host):
    """Several tiles for a block, the last not full, heads that share a sum, in both orders of the threads."""
    case = small(B=2, H=2, N=150, d=40)
    for order in ("forward", "backward"):
        host.configure(0, order=order)
        compare(host, OPERATOR, case)


def test_many_tiles(host):
    check_many_tiles(host)


def check_many_absorbed_tiles(host):
    """Three heads of 32 positions each, so that steps of a sum lie across heads; a row's own values; both orders."""
    case = small(B=2, H=3, N=70, T=23, channels=136, dtype=torch.bfloat16)
    for order in ("forward", "backward"):
        host.configure(0, order=order)
        compare_absorbed(host, case)


def test_many_absorbed_tiles(host):
    check_many_absorbed_tiles(host)


def check_halves_of_the_keys(host):
    """Contexts of which two warps have half each: in tall tiles and in flat ones, in both orders of the threads, the same bits."""
    for T, dtype in ((81, torch.float16), (154, torch.bfloat16), (231, torch.float16)):
        case = small(B=2, H=2, N=19, T=T, dtype=dtype)
        rows, results = set(), []
        for multiprocessors, order in ((0, "forward"), (64, "backward")):
            host.configure(multiprocessors, order=order)
            rows.add(host.layer_plan(**absorbed(case))["rows"])
            compare_absorbed(host, case)
            results.append(run(host, absorbed(case)))
        assert rows == {64, 32} and torch.equal(*results)


def test_halves_of_the_keys(host):
    check_halves_of_the_keys(host)


@pytest.mark.parametrize("T", (5, 77, 81, 154, 161, 256))
def test_absorbed_weights(host, T):
    """In the workspace: those of a head and token sum up to 1, and are exactly 0 from T on."""
    arguments = absorbed(small(B=2, H=2, N=19, T=T, d=32))
    workspace = torch.full((host.layer_workspace_bytes(**arguments),), 0xFF, dtype=torch.uint8)
    run(host, arguments, workspace=workspace)
    weights = workspace.view(torch.float16).view(2, 19, 2, (T + 15) // 16 * 16).double()
    assert (weights[..., :T] >= 0).all() and (weights[..., T:] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 19, 2, dtype=torch.float64), rtol=0, atol=1e-3)


def check_views_of_poisoned_memory(host, dtype=torch.float16, form=absorbed):
    """Strided, misaligned and surrounded by NaN: the bits of the dense call."""
    case = small(N=5, B=2, channels=43, dtype=dtype)
    dense = form(case)
    views = {name: None if tensor is None else cases.poisoned_view(tensor) for name, tensor in dense.items()}
    assert not views["key"].is_contiguous()
    assert torch.equal(run(host, views), run(host, dense))


@pytest.mark.parametrize("form", (layer, absorbed))
@pytest.mark.parametrize("dtype", HALVES)
def test_views_of_poisoned_memory(host, dtype, form):
    check_views_of_poisoned_memory(host, dtype, form)


def check_channels_within_longer_rows(host):
    """C that ends inside 16 bytes, in rows that go on with NaN: read in wide accesses, as far as C goes."""
    case = small(channels=44, T=13, N=5, B=2)

    def longer(tensor):
        room = torch.full((*tensor.shape[:-1], (tensor.shape[-1] + 7) // 8 * 8), torch.nan, dtype=tensor.dtype)
        room[..., : tensor.shape[-1]] = tensor
        return room[..., : tensor.shape[-1]]

    for form in (layer, absorbed):
        dense = form(case)
        padded = {name: None if tensor is None else longer(tensor) for name, tensor in dense.items()}
        assert torch.isfinite(run(host, dense)).all() and torch.equal(run(host, padded), run(host, dense))


def test_channels_within_longer_rows(host):
    check_channels_within_longer_rows(host)


@pytest.mark.parametrize("form", (layer, absorbed))
def test_bias_and_residual_may_be_absent(host, form):
    case = small(N=5, B=2, T=20, d=32)
    arguments = form(case)
    whole = run(host, arguments).double()
    summands = {"output_bias": case.output_bias, "residual": case.residual}
    for missing in (("output_bias",), ("residual",), ("output_bias", "residual")):
        part = run(host, {**arguments, **dict.fromkeys(missing)}).double()
        torch.testing.assert_close(part + sum(summands[name].double() for name in missing), whole, rtol=2e-3, atol=4e-3)


def test_the_residual_may_be_the_hidden_states(host):
    arguments = layer(small(N=5, B=2))
    once = run(host, {**arguments, "residual": arguments["hidden_states"]})
    assert torch.equal(once, run(host, {**arguments, "residual": arguments["hidden_states"].clone()}))


def check_the_sum_is_rounded_once(host):
    """Bias and residual that cancel leave the layer's part as it is; half precision has no fractions beside 1024."""
    for form in (layer, absorbed):
        arguments = form(small(N=16, B=1, T=20))
        part = run(host, {**arguments, "output_bias": None, "residual": None})
        large = {"output_bias": torch.full((72,), 1024.0).half(), "residual": torch.full((1, 16, 72), -1024.0).half()}
        torch.testing.assert_close(run(host, {**arguments, **large}), part, rtol=1e-3, atol=2e-4)


def test_the_sum_is_rounded_once(host):
    check_the_sum_is_rounded_once(host)


@pytest.mark.parametrize("form", (layer, absorbed))
def test_scores_may_be_large_or_equal(host, form):
    case = small(T=21, d=32, N=5, H=2, B=2)
    arguments = form(case)
    assert torch.isfinite(run(host, {**arguments, "key": 100 * arguments["key"]})).all()
    mean = run(host, {**arguments, "key": 0 * arguments["key"]})
    value = layer(case)["value"].double().mean(1).flatten(1) @ case.output_weight.double().T
    expected = value[:, None] + case.output_bias.double() + case.residual.double()
    torch.testing.assert_close(mean.double(), expected, rtol=2e-3, atol=8e-3)


def check_nothing_is_written_outside(host):
    """Between the rows of a strided output, and behind the workspace, sentinels stay."""
    for form in (layer, absorbed):
        arguments = form(small(B=2, N=19, T=13, d=32))
        needed = host.layer_workspace_bytes(**arguments)
        expected = run(host, arguments)
        for room in (8, 3):  # accesses of 16 bytes, and of one element
            memory = torch.full((2, 20, 72 + room), 7.0, dtype=torch.float16)
            workspace = torch.full((needed + 64,), 7, dtype=torch.uint8)
            result = run(host, arguments, output=memory[:, :19, :72], workspace=workspace)
            assert (memory[..., 72:] == 7).all() and (memory[:, 19:] == 7).all() and (workspace[needed:] == 7).all()
            assert torch.equal(result, expected)


def test_nothing_is_written_outside(host):
    check_nothing_is_written_outside(host)


@pytest.mark.parametrize("form", (layer, absorbed))
def test_schedules_agree(host, form):
    """Tall tiles or flat ones, one block or several for a head, any order of the threads: the same bits."""
    arguments = form(small(B=1, H=1, N=130, T=20, d=32))
    seen, results = set(), []
    for multiprocessors, order in ((0, "forward"), (2, "backward"), (64, "shuffled")):
        host.configure(multiprocessors, order=order)
        plan = host.layer_plan(**arguments)
        seen |= {("rows", plan["rows"]), ("second", plan["second_rows"]), ("shared", plan["splits"] > 1)}
        results.append(run(host, arguments))
    assert seen >= {("rows", 64), ("rows", 32), ("second", 64), ("second", 32), ("shared", True)}
    assert ("shared", False) in seen or form is absorbed
    assert all(torch.equal(result, results[0]) for result in results) and torch.isfinite(results[0]).all()


# (B, N, C, H, d) of Stable Diffusion 1.5's layers at two rows, and what a chip of 132 multiprocessors does with them
SHAPES = {
    (4096, 320, 8, 40): (64, 64),
    (1024, 640, 8, 80): (64, 64),
    (256, 1280, 8, 160): (32, 64),
    (64, 1280, 8, 160): (32, 32),
}


@pytest.mark.parametrize("form", ("plain", "absorbed"))
@pytest.mark.parametrize("shape", SHAPES)
def test_small_grids_have_flat_tiles(host, shape, form):
    """By sizes alone: tensors are not read by a plan. Shared memory is within that of 8.6, 8.9 and 12.0 whatever C is."""
    N, C, H, d = shape
    given = (16, 0, [1] * 4)
    tensors = {} if form == "absorbed" else {"query_weight": given, "output_weight": given}
    host.configure(132, 101376)
    plan = host.module.plan_cross_attention_layer(dict(B=2, N=N, C=C, T=77, H=H, d=d), tensors)
    assert plan["status"] == 0 and max(plan["bytes"], plan["second_bytes"]) <= 101376
    assert (plan["rows"], plan["second_rows"]) == SHAPES[shape]
    heads = 2 * H
    assert plan["blocks"] >= min(132, heads * -(-N // 32))
    assert plan["second_blocks"] >= min(132, 2 * N // 32 * C // 64)


def project_bytes(K, right):
    """Second launch for 128 tokens and channels, in tiles of 64: both operands for each tile, bias and residual for each element."""
    return 2 * (2 * 128 * K + 2 * right + 2 * 128 * 128)


def test_bytes_of_a_plain_layer(host):
    """First launch: x and, for each tile, W_Q,h for each head; K and V once. All of it 16 bytes at a time."""
    case = small(B=1, H=2, N=128, T=80, d=64, channels=128)
    host.configure(0)
    assert host.layer_plan(**layer(case))["splits"] == 1
    run(host, layer(case))
    counted = host.counted()
    N, C, H, d, T, tiles = 128, 128, 2, 64, 80, 2
    assert counted["read_narrow"] == counted["written_narrow"] == 0
    assert counted["read_wide"] == 2 * H * (N * C + tiles * d * C + 2 * T * d) + project_bytes(H * d, C * H * d)
    assert counted["written_wide"] == 2 * (N * H * d + N * C)


def test_bytes_of_an_absorbed_layer(host):
    """First launch: x and, for each tile, K'_h for each head."""
    case = small(B=1, H=2, N=128, T=80, d=64, channels=128)
    arguments = absorbed(case)
    host.configure(0)
    run(host, arguments)
    counted = host.counted()
    N, C, H, T, tiles = 128, 128, 2, 80, 2
    assert counted["read_narrow"] == counted["written_narrow"] == 0
    assert counted["read_wide"] == 2 * H * (N * C + tiles * T * C) + project_bytes(H * T, H * T * C)
    assert counted["written_wide"] == 2 * (N * H * T + N * C)


def check_heads_share_hidden_states(host, form):
    """Hidden states that fill the cache alone, for four heads: either launch moves its least, or within a tenth of that."""
    case = small(B=1, H=4, N=1024, d=64, channels=256)
    host.configure(4, 101376, shared_per_multiprocessor=102400, cache=512 << 10)
    run(host, form(case))
    least = floors.cross_attention_layer_launches(B=1, N=1024, C=256, T=77, H=4, d=64 if form is layer else None)
    for (_, read, written), work in zip(host.counted()["traffic"], least, strict=True):
        assert read + written <= 1.1 * work.bytes


def check_heads_share_hidden_states_plain(host):
    check_heads_share_hidden_states(host, layer)


def check_heads_share_hidden_states_absorbed(host):
    check_heads_share_hidden_states(host, absorbed)


def test_heads_share_hidden_states(host):
    check_heads_share_hidden_states_plain(host)
    check_heads_share_hidden_states_absorbed(host)


def check_weights_stay_in_the_cache(host):
    """Five turns of blocks, in a cache with room for W_O, the heads and outputs of a turn, and not for all residuals and outputs."""
    case = small(B=1, H=8, N=1536, d=40, channels=320)
    host.configure(8, 101376, shared_per_multiprocessor=102400, cache=512 << 10)
    assert host.layer_plan(**layer(case))["streamed_output"]
    run(host, layer(case))
    _, read, written = host.counted()["traffic"][1]
    _, least = floors.cross_attention_layer_launches(B=1, N=1536, C=320, T=77, H=8, d=40)
    assert read + written <= 1.1 * least.bytes


def test_weights_stay_in_the_cache(host):
    check_weights_stay_in_the_cache(host)


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_stay_for_the_next_launch_where_they_fit(host, shape):
    N, C, H, d = shape
    layer_bytes = 2 * (2 * 2 * N * C + C * C)  # two rows of heads and outputs, and W_O
    for cache, streamed in ((layer_bytes, False), (layer_bytes - 1, True)):
        host.configure(132, cache=cache)
        case = small(B=2, H=H, N=N, d=d, channels=C)
        assert host.layer_plan(**layer(case))["streamed_output"] == streamed


@pytest.mark.parametrize("form, expected", [(layer, 64 * 96 * 48 + 2 * 64 * 40 * 80 + 64 * 64 * 128), (absorbed, 64 * 96 * 80 + 64 * 96 * 128)])
def test_products(host, form, expected):
    """A head of 40 is multiplied as 48, 77 keys as 80, channels to the next 64 and sums to the next 32; nothing else is padded."""
    case = small(B=1, H=1, N=64, T=77, d=40, channels=96)
    host.configure(0)
    run(host, form(case))
    assert host.counted()["products"] == expected


@pytest.mark.parametrize("form", (layer, absorbed))
def test_rows_do_not_meet(host, form):
    """A batch row that is not finite stays alone."""
    arguments = form(small(N=5, T=20, d=32))
    whole = run(host, arguments)
    arguments["value"] = arguments["value"].clone()
    arguments["value"][1] = torch.nan
    result = run(host, arguments)
    others = [0, 2, 3]
    assert torch.equal(result[others], whole[others]) and result[1].isnan().all()


def test_empty(host):
    for sizes in (dict(B=0), dict(N=0)):
        case = small(**{"B": 2, "N": 2, "H": 2, **sizes})
        assert run(host, layer(case)).numel() == run(host, absorbed(case)).numel() == 0


def test_workspace(host):
    case = small(N=5, T=77, H=2, d=40)
    assert host.layer_workspace_bytes(**layer(case)) == 2 * 4 * 5 * 2 * 40
    assert host.layer_workspace_bytes(**absorbed(case)) == 2 * 4 * 5 * 2 * 80


def test_refusals(host):
    case = small(T=13, d=32, N=3)
    arguments = layer(case)
    small_room = torch.empty(100, dtype=torch.uint8)
    for changes, status, message in (
        (layer(small(T=13, d=48, N=3)), 2, "cross_attention_layer_workspace: d must be one of 32, 40, 64, 80, 96, 128, 160, or keys and values absorbed; got 48"),
        (layer(small(T=257, d=32, N=3)), 2, "cross_attention_layer_workspace: T must be at most 256; got 257"),
        ({"hidden_states": case.hidden_states.float()}, 1, "hidden_states must be float16 or another supported dtype; got float32"),
        ({"query_weight": case.query_weight.bfloat16()}, 1, "cross_attention_layer: query_weight must be float16; got bfloat16"),
        ({"residual": case.residual.bfloat16()}, 1, "cross_attention_layer: residual must be float16; got bfloat16"),
        ({"output_weight": None}, 1, "cross_attention_layer: output_weight must be given; got NULL"),
        ({"workspace": small_room}, 1, "cross_attention_layer: workspace must have 1536 bytes from a 16-byte aligned address on; got 100 from"),
        ({"workspace": torch.empty(1600, dtype=torch.uint8)[1:]}, 1, "workspace must have 1536 bytes from a 16-byte aligned address on; got 1599 from"),
    ):
        with pytest.raises(Refused, match=message) as refused:
            host.cross_attention_layer(**{**arguments, **changes})
        assert refused.value.status == status
    host.configure(shared_per_block=101376)
    message = "and a step of the query's projection must fit into shared memory, 101376 bytes a block on this device; got T = 154 and d = 160"
    with pytest.raises(Refused, match=message):
        host.cross_attention_layer(**layer(small(T=154, d=160, N=3, B=1, H=1)))
