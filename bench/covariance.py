"""The effect of the choices behind C = E[e eᵀ] on the similarity c that a gate reads. Tables of docs/covariance.md.

    PYTHONPATH=.:python python bench/covariance.py                          # an untrained text encoder of width 64; 1 minute
    PYTHONPATH=.:python python bench/covariance.py --model PATH             # any diffusers folder
    PYTHONPATH=.:python python bench/covariance.py --covariance FILE        # encodings drawn from N(0, C) of a stored C

Every number is about c(e) = eᵀ C⁻¹ i* / i*ᵀ C⁻¹ i* over 64 random encodings as targets i* and 2,000 others as e, all from
captions; gates are sigmoid((c − 0.7) / 0.15). Needs no GPU.
"""

from __future__ import annotations

import argparse
import itertools

import torch

from perfusion.captions import everyday_captions, read_captions
from perfusion.covariance import Covariance, real_encodings
from perfusion_kernels.metric import condition_number, metric_targets, shrink

TARGETS, PROBES = 64, 2000
LIMITS = (1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e10, 1e12)


def similarity(encodings, targets, covariance):
    """c of each encoding [N, D] to each target [S, D]: [N, S]."""
    metric = metric_targets(targets, covariance)
    return encodings @ metric.T / (targets * metric).sum(1)


def report(label: str, found: torch.Tensor, truth: torch.Tensor) -> str:
    """Root mean square and largest error of c, and the largest error of a gate."""
    error, gate = (found - truth).abs(), lambda c: torch.sigmoid((c - 0.7) / 0.15)
    return f"{label:>14} {error.square().mean().sqrt():10.1e} {error.max():10.1e} {(gate(found) - gate(truth)).abs().max():10.1e}"


def moment(rows: torch.Tensor) -> torch.Tensor:
    return rows.T @ rows / len(rows)


def draw(rows: torch.Tensor, seed: int = 0):
    """Targets and probes out of all rows, each drawn once."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:TARGETS]], rows[order[TARGETS : TARGETS + PROBES]]


def encode(pipe, captions) -> list[torch.Tensor]:
    """One [tokens, D] float64 tensor per batch of 100 captions."""
    captions = iter(captions)
    with torch.no_grad():
        batches = iter(lambda: list(itertools.islice(captions, 100)), [])
        return [real_encodings(pipe, batch).double().cpu() for batch in batches]


def table_of_counts(batches: list[torch.Tensor], raw: torch.Tensor) -> None:
    """The change of c between the C of the first n captions and the C of all."""
    targets, probes = draw(torch.cat(batches))
    truth = similarity(probes, targets, shrink(raw, 1e6)[0])
    print("\n1. Fewer captions\n      captions      rms c      max c   max gate   condition  shrinkage")
    for count in (1, 3, 10, 30, 100):
        if count < len(batches):
            part = moment(torch.cat(batches[:count]))
            covariance, weight = shrink(part, 1e6)
            line = report(f"{100 * count:,}", similarity(probes, targets, covariance), truth)
            print(f"{line} {condition_number(part):11.1e} {weight:10.1e}")


def table_of_limits(rows: torch.Tensor, raw: torch.Tensor) -> None:
    """The errors by rounding and by shrinkage, for each limit of the condition number."""
    targets, probes = draw(rows)
    print(f"\n2. The limit of the condition number (here {condition_number(raw):.1e}); largest error of c")
    print("         limit  shrinkage  condition |  shrinking  i* in f16  e in f16  e in bf16  f32 inside")
    best = similarity(probes, targets, shrink(raw, LIMITS[-1])[0])
    for limit in LIMITS:
        covariance, weight = shrink(raw, limit)
        truth = similarity(probes, targets, covariance)
        metric = metric_targets(targets, covariance)
        found = (
            best,
            similarity(probes, targets.half().double(), covariance),
            similarity(probes.half().double(), targets, covariance),
            similarity(probes.bfloat16().double(), targets, covariance),
            (probes.float() @ metric.float().T / (targets.float() * metric.float()).sum(1)).double(),
        )
        errors = " ".join(f"{(c - truth).abs().max():10.1e}" for c in found)
        print(f"{limit:14.0e} {weight:10.1e} {condition_number(covariance):10.1e} | {errors}")


def untrained():
    """A CLIP text encoder with random weights, whose last layer norm has a scale and a bias like a trained one's."""
    from tests.perfusion.tiny import tiny_sd

    pipe = tiny_sd(width=64)
    norm = next(m for name, m in pipe.text_encoder.named_modules() if name.endswith("final_layer_norm"))
    norm.weight.copy_(1 + 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(0)))
    norm.bias.copy_(0.01 * torch.randn(64, generator=torch.Generator().manual_seed(1)))
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a diffusers pipeline folder, or toybox")
    parser.add_argument("--covariance", help="a file of `perfusion covariance`: draw encodings from it, encode nothing")
    parser.add_argument("--captions", help="a .txt, .jsonl or .csv instead of the built-in corpus")
    parser.add_argument("--count", type=int, default=10_000)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.covariance:
        raw = Covariance.load(options.covariance).matrix
        batches = list((torch.randn(54_000, len(raw), dtype=torch.float64) @ torch.linalg.cholesky(raw).T).split(1350))
    else:
        if options.model:
            from perfusion.models import load_pipeline

            pipe = load_pipeline(options.model)
        else:
            pipe = untrained()
        captions = read_captions(options.captions) if options.captions else everyday_captions(options.count)
        batches = encode(pipe, itertools.islice(captions, options.count))
        raw = moment(torch.cat(batches))
    table_of_counts(batches, raw)
    table_of_limits(torch.cat(batches), raw)


if __name__ == "__main__":
    main()
