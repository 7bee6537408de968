"""`fused_edited_attention`: the core of one layer, for encodings that change at every step, projected and edited in the call."""

from collections.abc import Iterator

from bench import formulas
from bench.measure import Options, Problem
from bench.providers import formula, library, ours
from bench.suites.draw import T, case, problem, unets
from bench.timing import Candidate
from tests.kernels import cases


def problems(options: Options) -> Iterator[Problem]:
    for model, layers, D, B in unets(options):
        for layer in layers:
            N, H, d = layer.N, layer.H, layer.d
            one = case(options, B=B, D=D, J=1, H=H, d=d, N=N)
            scale = d**-0.5

            def candidates(arguments: dict, scale: float = scale) -> list[Candidate]:
                positional = cases.positional("fused_edited_attention", arguments, scale)
                return [
                    *ours("fused_edited_attention", arguments, scale=scale),
                    *library(lambda: formulas.expert_fused_edited_attention(*positional)),
                    *formula("fused_edited_attention", positional, options.compile),
                ]

            arguments, name = one.arguments("fused_edited_attention"), f"{model}, {B} rows, N = {N}, d = {d}"
            yield problem(
                name, "fused_edited_attention", arguments, scale, one.index, options, candidates, B=B, N=N, T=T, D=D, H=H, d=d, J=1
            )
