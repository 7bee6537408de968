"""`concept_gates`: of a prompt's tokens, once per prompt."""

from collections.abc import Iterator

from bench.measure import Options, Problem
from bench.providers import formula, ours
from bench.suites.draw import T, case, places, problem, unets
from tests.kernels import cases


def problems(options: Options) -> Iterator[Problem]:
    for model, _, D, B in unets(options):
        for J in places(options):
            one = case(options, B=B, D=D, J=J, H=1, d=8, N=1)
            arguments = one.arguments("concept_gates")
            contestants = [*ours("concept_gates", arguments), *formula("concept_gates", cases.positional("concept_gates", arguments))]
            yield problem(
                f"{model}, {B} rows, J = {J}", "concept_gates", arguments, 1.0, one.index, options, contestants, B=B, T=T, D=D, J=J
            )
