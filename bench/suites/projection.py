"""`edited_projection`, and its fused form: the values of all layers of a model, once per prompt."""

from collections.abc import Iterator

from bench.measure import Options, Problem
from bench.providers import formula, ours
from bench.suites.draw import T, case, places, problem, unets
from tests.kernels import cases


def problems(options: Options) -> Iterator[Problem]:
    for model, layers, D, B in unets(options):
        O = sum(layer.count * layer.C for layer in layers)
        for J in places(options):
            one = case(options, B=B, D=D, J=J, H=1, d=O, N=1)
            arguments = one.arguments("edited_projection")
            positional = cases.positional("edited_projection", arguments)
            contestants = [
                *ours("edited_projection", arguments),
                *ours("fused_edited_projection", arguments, " fused"),
                *formula("edited_projection", positional),
            ]
            yield problem(
                f"{model}, {B} rows, J = {J}", "edited_projection", arguments, 1.0, one.index, options, contestants, B=B, T=T, D=D, O=O, J=J
            )
