"""`edited_attention`: the core of one layer, with keys and values that are edited already (J = 0), or in the call."""

from collections.abc import Iterator
from functools import partial

from bench import formulas
from bench.measure import Options, Problem
from bench.providers import formula, library, ours
from bench.roofline import Layer
from bench.suites.draw import Planned, T, case, problem, unets
from bench.timing import Candidate
from tests.kernels import cases

WIDTH = 16  # D: there are keys and values already


def planned(options: Options) -> Iterator[Planned]:
    for model, layers, _, B in unets(options):
        for layer in layers:
            for J in options.places or (0, 1):
                name = f"{model}, {B} rows, N = {layer.N}, d = {layer.d}, J = {J}"
                yield Planned(name, layer, partial(_problem, name, options, layer, B, J))


def _problem(name: str, options: Options, layer: Layer, B: int, J: int) -> Problem:
    N, H, d = layer.N, layer.H, layer.d
    scale = d**-0.5
    one = case(options, B=B, D=WIDTH, J=J, H=H, d=d, N=N)
    arguments = one.arguments("edited_attention")
    if J == 0:
        arguments = {name: tensor if name in ("query", "key", "value") else None for name, tensor in arguments.items()}

    def candidates(arguments: dict) -> list[Candidate]:
        positional = cases.positional("edited_attention", arguments, scale)
        return [
            *ours("edited_attention", arguments, scale=scale),
            *library(lambda: formulas.expert_edited_attention(*positional)),
            *formula("edited_attention", positional, options.compile),
        ]

    return problem(name, "edited_attention", arguments, scale, one.index, options, candidates, B=B, N=N, T=T, H=H, d=d, J=J)
