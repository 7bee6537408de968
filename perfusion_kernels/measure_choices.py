"""`measure_choices`: what the table of choices holds for a model's shapes on this device, measured and kept for the user."""

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import choices, contest, user_cache
from .absorption import absorb_projections
from .backend import BackendUnavailable, select
from .cross_attention_layer import cross_attention_layer
from .edited_projection import edited_projection
from .reference import cross_attention_layer as layer_law
from .reference import edited_projection as projection_law

Layer = tuple[int, int, int, int]
Draw = Callable[..., Tensor]

DEVICES = ("cpu", "cuda", "xpu")


@dataclass(frozen=True)
class Measured:
    """choices: the rows that were written. reasons: why others were not, and why rows that were there are passed over."""

    choices: tuple[choices.Choice, ...]
    reasons: tuple[str, ...]


def measure_choices(
    layers: Iterable[Layer],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    rows: int = 2,
    tokens: int = 77,
    text_width: int = 768,
    concepts: int = 1,
    measure: contest.Measure | None = None,
) -> Measured:
    """Times the compiled `edited_projection` against the library, and each layer absorbed against plain; keeps what it found.

    What it keeps, in the user's cache, decides calls of `edited_projection` that ask for backend="measured", and
    `absorb_where_faster`. A result that is not as near to the float64 law as the tests want it takes no part. A way is
    taken that needs at most 0.97 of the other's time.

    Args:
        layers: (N, C, H, d) of each layer: image tokens, channels, heads, head width. Repeated ones count once.
        device: of the calls to come: cpu, cuda or xpu. dtype: float16, bfloat16, float32 or float64.
        rows, tokens, text_width, concepts: B, T, D and J of the calls to come.
        measure: the time of a call, in any unit. None: between events on an emptied cache on a GPU, and a clock on a CPU.

    Returns:
        the rows that were written, and reasons for what is missing.

    Raises:
        ValueError: no layer is given, or another device.

    Source: DESIGN.md, "Choices by measurement".
    """
    layers = list(layers)
    if not layers:
        raise ValueError("measure_choices: layers must name at least one layer; got none")
    device = torch.empty(0, device=device).device  # with its number
    if device.type not in DEVICES:
        raise ValueError(f"measure_choices: device must be {' or '.join(DEVICES)}, whose time can be measured; got {device}")
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

    found, reasons = [], list(choices.known(user_cache.kind(device))[1])
    with torch.no_grad():
        for outcome in _outcomes(layers, draw, rows, tokens, text_width, concepts, measure):
            (found if isinstance(outcome, choices.Choice) else reasons).append(outcome)
    choices.keep(found)
    return Measured(tuple(found), tuple(reasons))


def _outcomes(
    layers: list[Layer], draw: Draw, B: int, T: int, D: int, J: int, measure: contest.Measure | None
) -> Iterator[choices.Choice | str]:
    O = sum(H * d for _, _, H, d in layers)  # all layers are projected at once
    yield from _projection(_projection_arguments(draw, B, T, D, O, J), (B, T, D, O), measure)
    for N, C, H, d in dict.fromkeys(layers):
        yield from _layer(_layer_arguments(draw, B, N, C, T, H, d), (B, N, C, T, H, d), measure)


def _projection_arguments(draw: Draw, B: int, T: int, D: int, O: int, J: int) -> tuple[Tensor, ...]:
    encodings, gates, components = draw(B, T, D), draw(B, T, J).float(), draw(B, T, J).float()
    index = torch.arange(J, dtype=torch.int32, device=encodings.device).expand(B, J)
    return encodings, draw(O, D, scale=D**-0.5), gates, components, index, draw(J, O), draw(J, O)


def _projection(arguments: tuple[Tensor, ...], sizes: tuple[int, ...], measure) -> Iterator[choices.Choice | str]:
    try:
        select("edited_projection", arguments, "cuda")
    except BackendUnavailable as error:
        yield str(error)
        return
    contestants = {
        "cuda": lambda: edited_projection(*arguments, validate=False, backend="cuda"),
        "library": lambda: edited_projection(*arguments, validate=False, backend="auto"),
        "baddbmm": lambda: _by_the_library_alone(*arguments),
    }
    exact = projection_law.edited_projection(*map(_double, arguments))
    plain = projection_law.edited_projection(*arguments)
    yield _decided("edited_projection", contestants, plain, exact, sizes, measure)


def _by_the_library_alone(encodings, weight, gates, components, index, outputs, targets) -> Tensor:
    """Its product, and the edit as one more, of rank 2 J (DESIGN.md, (11))."""
    G, tables, index = torch.cat([gates, -components], -1), (outputs, targets), index.long()
    return torch.baddbmm(linear(encodings, weight), G.to(encodings.dtype), torch.cat([table[index] for table in tables], 1))


def _layer_arguments(draw: Draw, B: int, N: int, C: int, T: int, H: int, d: int) -> tuple[Tensor, ...]:
    O = H * d
    weights = draw(O, C, scale=C**-0.5), draw(C, O, scale=O**-0.5)
    return draw(B, N, C), weights[0], draw(B, T, H, d), draw(B, T, H, d), weights[1], draw(C), draw(B, N, C)


def _layer(arguments: tuple[Tensor, ...], sizes: tuple[int, ...], measure) -> Iterator[choices.Choice | str]:
    hidden_states, *weights_keys_values, bias, residual = arguments
    key, value = absorb_projections(*weights_keys_values)
    absorbed = hidden_states, None, key, value, None, bias, residual
    contestants = {
        "absorbed": lambda: cross_attention_layer(*absorbed, validate=False, backend="auto"),
        "plain": lambda: cross_attention_layer(*arguments, validate=False, backend="auto"),
    }
    scale = weights_keys_values[1].shape[-1] ** -0.5
    exact = layer_law.cross_attention_layer(*map(_double, arguments), scale)
    plain = layer_law.cross_attention_layer(*arguments, scale)
    yield _decided("cross_attention_layer", contestants, plain, exact, sizes, measure)


def _decided(
    operator: str,
    contestants: Mapping[str, contest.Call],
    plain: Tensor,
    exact: Tensor,
    sizes: tuple[int, ...],
    measure: contest.Measure | None,
) -> choices.Choice | str:
    """The first of the contestants against the others, or why there was no contest; plain and exact as `contest.admit` has them."""
    right, reasons = contest.admit(contestants, plain, exact)
    first, *others = contestants
    if not any(name in right for name in others):
        return f"{operator} {sizes}: {'; '.join(f'{name} {why}' for name, why in reasons.items())}"
    ratio, against, rounds = None, reasons.get(first, ""), 0
    if first in right:
        found, rounds = contest.ratios(first, right, exact.device, measure)
        against = max(found, key=found.get)
        ratio = round(found[against], 4)
    return choices.Choice(
        device=user_cache.kind(exact.device),
        operator=operator,
        dtype=choices.dtype_name(plain.dtype),
        sizes=dict(zip(choices.SIZES[operator], sizes)),
        choice=choices.OUTCOMES[operator][not choices.won(ratio)],
        ratio=ratio,
        against=against,
        rounds=rounds,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        torch=torch.__version__,
    )


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
