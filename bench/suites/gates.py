"""`concept_gates`: of a prompt's tokens, once per prompt."""

from collections.abc import Iterator

from bench.measure import Options, Problem
from bench.providers import formula, ours
from bench.suites.draw import T, case, places, problem, unets
from bench.timing import Candidate
from tests.kernels import cases


def problems(options: Options) -> Iterator[Problem]:
    def candidates(arguments: dict) -> list[Candidate]:
        positional = cases.positional("concept_gates", arguments)
        return [*ours("concept_gates", arguments), *formula("concept_gates", positional, options.compile)]

    for model, _, D, B in unets(options):
        for J in places(options):
            one = case(options, B=B, D=D, J=J, H=1, d=8, N=1)
            name = f"{model}, {B} rows, J = {J}"
            yield problem(name, "concept_gates", one.arguments("concept_gates"), 1.0, one.index, options, candidates, B=B, T=T, D=D, J=J)
