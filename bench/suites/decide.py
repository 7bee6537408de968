"""Measures what launch plans assume: read rates of L2 and memory, mma.sync compared with the library's product, the cost of a launch.

The programs are those of bench/microbenchmarks. On a CPU the library's product and our reference of it run alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import microbenchmarks
from bench.measure import Options, Problem
from bench.providers import ours
from bench.timing import Candidate

M, N, K = 2048, 1280, 1280  # to_q of SDXL's 1024 tokens for two rows
TILES = ((128, 64), (128, 128), (256, 128))
MEBIBYTE = 2**20
BUFFERS = (4, 16, 32, 1024)  # MiB: in every L2, in an H100's, and in none
READ = 1024  # MiB that a call reads at least
ISSUES, BLOCKS = 2000, 2  # rounds of the issue loop; blocks of eight warps on a multiprocessor
ISSUED = 8 * 8 * 4096  # FLOPs of a block in a round: eight warps, eight instructions m16n8k16


def problems(options: Options) -> Iterator[Problem]:
    yield product(options)
    for buffer in (1,) if options.quick else BUFFERS:
        yield read(buffer, options)
    yield issue(options)
    yield launches(options)


def on_gpu(name: str, options: Options, make: Callable[[], Callable[[], object]], **more) -> Candidate:
    """A candidate of the microbenchmarks; `make` gives its call, once it is known to be possible."""
    if options.device.type != "cuda":
        return Candidate(name, None, "the microbenchmarks need a GPU")
    try:
        return Candidate(name, make(), **more)
    except (OSError, RuntimeError) as error:
        return Candidate(name, None, str(error))


def launch(function: str, *arguments) -> None:
    """Calls a function of the microbenchmarks with tensors as pointers, on the current stream."""
    library, stream = microbenchmarks.load(), torch.cuda.current_stream().cuda_stream
    values = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
    if status := getattr(library, function)(*values, stream):
        raise RuntimeError(f"{function}: the launch failed with status {status}")


def multiprocessors(options: Options) -> int:
    return torch.cuda.get_device_properties(options.device).multi_processor_count


def one_row(options: Options) -> Tensor:
    """An index for the gate: one batch row, no concept."""
    return torch.full((1, 1), -1, dtype=torch.int32, device=options.device)


def product(options: Options) -> Problem:
    """x Wᵀ: the library's, tiles on mma.sync, and `edited_projection` without a concept."""
    m, n, k = (64, 48, 32) if options.quick else (M, N, K)
    draw = torch.Generator(options.device).manual_seed(0)
    x, weight = (torch.randn(*shape, generator=draw, device=options.device).to(options.dtype) for shape in ((1, m, k), (n, k)))

    def candidates(x: Tensor, weight: Tensor) -> list[Candidate]:
        def tile(rows: int, columns: int) -> Callable[[], Tensor]:
            microbenchmarks.load()

            def call() -> Tensor:
                result = x.new_empty(1, m, n)
                launch("multiply_matrices", x, weight, result, m, n, k, rows, columns)
                return result

            return call

        none = torch.zeros(1, m, 0, device=x.device)
        table = torch.zeros(1, n, device=x.device, dtype=x.dtype)
        edit = dict(gates=none, components=none, index=none[0, :1].int(), outputs=table, projected_targets=table)
        return [
            Candidate("library", functools.partial(torch.nn.functional.linear, x, weight), on_graph=True),
            *(on_gpu(f"mma.sync {shape[0]}x{shape[1]}", options, functools.partial(tile, *shape), on_graph=True) for shape in TILES),
            *ours("edited_projection", {"encodings": x, "weight": weight, **edit}, " edited_projection"),
        ]

    return Problem(
        f"product, {m} x {n} x {k}", dict(M=m, N=n, K=k), options.dtype, one_row(options), exact=lambda: x.double() @ weight.double().T,
        plain=lambda: x @ weight.T, candidates=candidates(x, weight), again=lambda: candidates(x.clone(), weight.clone()),
        copied=x.nbytes + weight.nbytes, facts={"bytes": x.element_size() * (m * k + n * k + m * n), "flops": 2 * m * n * k},
    )  # fmt: skip


def read(mebibytes: int, options: Options) -> Problem:
    """All words of a buffer, summed modulo 2^32, repeatedly; torch's sum reads it once."""
    repeats = 1 if options.quick else max(1, READ // mebibytes)
    draw = torch.Generator(options.device).manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (mebibytes * MEBIBYTE // 4,), dtype=torch.int32, generator=draw, device=options.device)
    total = torch.zeros(1, dtype=torch.int32, device=options.device)

    def modulo(sum: Tensor) -> Tensor:
        return (sum.long() % 2**32).double().reshape(1, 1)

    def make() -> Callable[[], None]:
        count = multiprocessors(options)
        microbenchmarks.load()
        return lambda: launch("read_repeatedly", words, words.nbytes, repeats, total, count)

    def checked(call: Callable[[], object], calls: int) -> Tensor:
        total.zero_()
        call()
        return modulo(total)

    def truth() -> Tensor:
        return modulo(words.sum(dtype=torch.int64) * repeats)

    return Problem(
        f"read, {mebibytes} MiB, {repeats} times", dict(MiB=mebibytes, repeats=repeats), torch.int32, one_row(options),
        exact=truth, plain=truth, candidates=[on_gpu("ld.global.cg", options, make, check=checked)],
        facts={"bytes": words.nbytes * repeats},
    )  # fmt: skip


def issue(options: Options) -> Problem:
    """mma.sync from registers, with nothing to wait for."""
    blocks, repeats = (1, 2) if options.device.type != "cuda" else (BLOCKS * multiprocessors(options), ISSUES)
    sums = torch.zeros(1, blocks * 256, device=options.device)

    def make() -> Callable[[], Tensor]:
        microbenchmarks.load()

        def call() -> Tensor:
            launch("issue_products", sums, blocks, repeats)
            return sums

        return call

    def truth(dtype: torch.dtype) -> Tensor:
        return torch.full(sums.shape, 512.0 * repeats, dtype=dtype, device=options.device)

    return Problem(
        f"mma.sync alone, {repeats} rounds", dict(blocks=blocks, repeats=repeats), torch.bfloat16, one_row(options),
        exact=lambda: truth(torch.float64), plain=lambda: truth(torch.float32), candidates=[on_gpu("mma.sync", options, make)],
        facts={"flops": ISSUED * blocks * repeats},
    )  # fmt: skip


def launches(options: Options) -> Problem:
    """A kernel of one block that adds one to a number: alone, twenty in a graph, and each allowed to begin before the last has ended."""
    number = torch.zeros(1, 1, dtype=torch.int32, device=options.device)

    def make(programmatic: int) -> Callable[[], None]:
        microbenchmarks.load()
        if programmatic and torch.cuda.get_device_capability(options.device) < (9, 0):
            raise RuntimeError("programmatic dependent launch is for compute capability 9.0 and newer")
        return lambda: launch("launch_once", number, programmatic)

    def counted(call: Callable[[], object], calls: int) -> Tensor:
        """1 if the counter equals the number of calls."""
        call()  # a graph is captured, which takes calls of its own
        number.zero_()
        call()
        return number.double() / calls

    one = lambda: torch.ones(1, 1, dtype=torch.float64, device=options.device)  # noqa: E731
    candidates = [
        on_gpu("launch", options, functools.partial(make, 0), check=counted, on_graph=True),
        on_gpu("programmatic launch", options, functools.partial(make, 1), check=counted, on_graph=True),
        Candidate("torch add_", functools.partial(number.add_, 1), check=counted, on_graph=True),
    ]
    return Problem("launch of one block", {}, torch.int32, one_row(options), exact=one, plain=one, candidates=candidates)
