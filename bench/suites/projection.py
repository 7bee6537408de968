"""`edited_projection`, and its fused form: the values of all layers of a model, once per prompt."""

from collections.abc import Iterator

from bench import roofline
from bench.measure import Options, Problem
from bench.providers import formula, ours
from bench.suites.draw import T, case, places, problem, unets
from bench.timing import Candidate
from tests.kernels import cases


def problems(options: Options) -> Iterator[Problem]:
    def candidates(arguments: dict) -> list[Candidate]:
        return [
            *ours("edited_projection", arguments),
            *ours("fused_edited_projection", arguments, " fused"),
            *formula("edited_projection", cases.positional("edited_projection", arguments), options.compile),
        ]

    for model, layers, D, B in unets(options):
        O = sum(layer.count * layer.C for layer in roofline.UNETS.get(model, layers))
        for J in places(options):
            one = case(options, B=B, D=D, J=J, H=1, d=O, N=1)
            arguments, name = one.arguments("edited_projection"), f"{model}, {B} rows, J = {J}"
            yield problem(name, "edited_projection", arguments, 1.0, one.index, options, candidates, B=B, T=T, D=D, O=O, J=J)
