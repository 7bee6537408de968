"""`cross_attention_layer`: to_q to residual, for stored keys and values of a prompt; diffusers' block also projects the text."""

from collections.abc import Iterator
from functools import partial

import torch

from bench import formulas
from bench.measure import Options, Problem
from bench.providers import formula, library, ours
from bench.roofline import Layer
from bench.suites.draw import Planned, T, case, problem, unets
from bench.timing import Candidate
from tests.kernels import cases


def planned(options: Options) -> Iterator[Planned]:
    for model, layers, D, B in unets(options):
        for layer in layers:
            name = f"{model}, {B} rows, N = {layer.N}, C = {layer.C}"
            yield Planned(name, layer, partial(_problem, name, options, layer, B, D))


def _problem(name: str, options: Options, layer: Layer, B: int, D: int) -> Problem:
    N, C, H, d = layer.N, layer.C, layer.H, layer.d
    scale = d**-0.5
    one = case(options, B=B, D=D, J=0, H=H, d=d, N=N, channels=C)

    def candidates(arguments: dict) -> list[Candidate]:
        positional = cases.positional("cross_attention_layer", arguments, scale)
        return [
            *ours("cross_attention_layer", arguments, scale=scale),
            *library(lambda: formulas.expert_cross_attention_layer(*positional)),
            Candidate("expert addmm", lambda: formulas.addmm_cross_attention_layer(*positional), on_graph=True),
            diffusers(one),
            *formula("cross_attention_layer", positional, options.compile),
        ]

    arguments = one.arguments("cross_attention_layer")
    return problem(name, "cross_attention_layer", arguments, scale, one.index, options, candidates, B=B, N=N, C=C, T=T, H=H, d=d, D=D)


def diffusers(one: cases.Case) -> Candidate:
    """The pipeline's own block, which projects the text to K and V at every step."""
    try:
        from diffusers.models.attention_processor import Attention
    except ImportError as error:
        return Candidate("diffusers", None, f"diffusers cannot be imported: {error}")
    H, d = one.query.shape[2:]
    with torch.device("meta"):
        block = Attention(one.hidden_states.shape[-1], one.encodings.shape[-1], heads=H, dim_head=d)
    weights = {
        "to_q.weight": one.query_weight, "to_k.weight": one.key_weight, "to_v.weight": one.value_weight,
        "to_out.0.weight": one.output_weight, "to_out.0.bias": one.output_bias,
    }  # fmt: skip
    block.load_state_dict(weights, assign=True)
    block.eval()

    @torch.no_grad()
    def call() -> torch.Tensor:
        return block(one.hidden_states, encoder_hidden_states=one.encodings) + one.residual

    return Candidate("diffusers", call)
