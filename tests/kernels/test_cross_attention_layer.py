"""`cross_attention_layer`: what diffusers computes, around each backend's attention; absorbed; and its refusals."""

import re
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from perfusion_kernels import BackendUnavailable, absorb_projections, cross_attention_layer, edited_attention

from . import cases, plain
from .tolerance import assert_agree, assert_close, assert_no_worse, exactly

pytestmark = pytest.mark.numeric

RUNS = [(None, "cpu"), *cases.runs("edited_attention")]  # the attention in its middle
each_run = pytest.mark.parametrize("backend, device", RUNS)


def made(backend, device, **sizes):
    return cases.make(backend=backend or "reference", device=device, **sizes)


def layer(case):
    return case.arguments("cross_attention_layer")


def absorbed(case, scale=None):
    """The same layer's arguments with its projections absorbed."""
    arguments = layer(case)
    names = ("query_weight", "key", "value", "output_weight")
    key, value = absorb_projections(*(arguments[name] for name in names), scale=scale)
    return {**arguments, "query_weight": None, "key": key, "value": value, "output_weight": None}


def truth(case, scale=None):
    scale = case.key.shape[-1] ** -0.5 if scale is None else scale
    return exactly(lambda: plain.cross_attention_layer(**layer(case.double()), scale=scale))[0]


def test_is_the_attention_of_diffusers():
    """One layer of a UNet with `to_q`, `to_out`, its residual, and nothing else."""
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attention = Attention(query_dim=29, cross_attention_dim=19, heads=3, dim_head=8, bias=False).double()
    case = cases.make(dtype=torch.float64)
    to_out = attention.to_out[0]

    def one_call():
        key, value = (project(case.encodings).unflatten(-1, (3, 8)) for project in (attention.to_k, attention.to_v))
        return cross_attention_layer(
            case.hidden_states, attention.to_q.weight, key, value, to_out.weight, to_out.bias, case.residual
        )

    assert_agree(one_call, lambda: attention(case.hidden_states, case.encodings) + case.residual)


@pytest.mark.parametrize("scale", (None, 0.05))
def test_is_projection_attention_projection(scale):
    case = cases.make(T=77, dtype=torch.float64)

    def in_three_steps():
        query = functional.linear(case.hidden_states, case.query_weight).unflatten(-1, case.key.shape[2:])
        attended = edited_attention(query, case.key, case.value, scale=scale).flatten(2)
        return case.residual + functional.linear(attended, case.output_weight, case.output_bias)

    assert_agree(lambda: cross_attention_layer(**layer(case), scale=scale), in_three_steps)


each_form = pytest.mark.parametrize("form, backend, device", [*((layer, *run) for run in RUNS), (absorbed, None, "cpu")])


@pytest.mark.parametrize("scale", (None, 0.05))
def test_absorption_changes_nothing(scale):
    case = cases.make(T=77, dtype=torch.float64)
    assert_agree(lambda: cross_attention_layer(**absorbed(case, scale)), lambda: cross_attention_layer(**layer(case), scale=scale))


def each_run_in(*dtypes):
    """Every run, in those of the dtypes that it takes."""
    runs = [(*run, dtype) for run in RUNS for dtype in dtypes if cases.takes("edited_attention", run[0], dtype)]
    return pytest.mark.parametrize("backend, device, dtype", runs)


@pytest.mark.parametrize("dtype", cases.FLOATING)
@pytest.mark.parametrize("channels", (24, 80))
def test_absorbed_is_no_worse_than_the_plain_formula(dtype, channels):
    case = cases.make(dtype=dtype, channels=channels)
    naive = plain.cross_attention_layer(**layer(case), scale=case.key.shape[-1] ** -0.5)
    assert_no_worse(cross_attention_layer(**absorbed(case)), naive, truth(case), case.index)


def test_absorbed_is_plain_torch_s():
    for backend, device in cases.runs("edited_attention"):
        if backend != "reference":
            with pytest.raises(BackendUnavailable, match="it does not implement this operator. Can run it: reference"):
                cross_attention_layer(**absorbed(cases.make(device=device)), backend=backend)


@each_form
@pytest.mark.parametrize(
    "sizes",
    [dict(T=1), dict(T=77, d=40), dict(T=154, d=7), dict(d=1, H=1, N=1), dict(N=33, d=24, views=True)],
    ids=str,
)
def test_sizes_in_half_precision(backend, device, form, sizes):
    """Where tensor cores multiply, which in float32 they do not, sizes are cut into other tiles."""
    case = made(backend, device, **{"B": 2, "N": 5, "H": 2, **sizes}, dtype=torch.float16)
    naive = plain.cross_attention_layer(**layer(case), scale=case.key.shape[-1] ** -0.5)
    assert_no_worse(cross_attention_layer(**form(case), backend=backend), naive, truth(case), case.index)


@each_form
def test_bias_and_residual_may_be_absent(backend, device, form):
    case = made(backend, device)
    arguments = form(case)
    for missing in (("output_bias",), ("residual",), ("output_bias", "residual")):
        part = cross_attention_layer(**{**arguments, **dict.fromkeys(missing)}, backend=backend)
        assert_close(part, truth(replace(case, **{name: torch.zeros_like(getattr(case, name)) for name in missing})))


@each_run_in(*cases.FLOATING)
@pytest.mark.parametrize("without", ((), ("output_bias",), ("residual",)))
def test_the_layer_around_an_attention(backend, device, dtype, without):
    """Result, derivatives and autocast."""
    case = made(backend, device, dtype=dtype)
    arguments = {**layer(case), **dict.fromkeys(without)}
    given = leaves(arguments)
    scale = case.key.shape[-1] ** -0.5
    mine = cross_attention_layer(**{**arguments, **given}, backend=backend)
    zero = {name: torch.zeros_like(layer(case)[name]) for name in without}
    naive = plain.cross_attention_layer(**{**layer(case), **zero}, scale=scale)
    doubles = {**layer(case.double()), **{name: x.double() for name, x in zero.items()}}
    (exact,) = exactly(lambda: plain.cross_attention_layer(**doubles, scale=scale))
    assert_no_worse(mine, naive, exact, case.index)
    if dtype == torch.float64:

        def gradients(backend):
            result = cross_attention_layer(**{**arguments, **given}, backend=backend)
            return torch.autograd.grad(result.square().sum(), list(given.values()))

        assert_agree(lambda: gradients(backend), lambda: gradients("reference"))
    if dtype == torch.float32:
        halves = {name: x if x is None else x.bfloat16() for name, x in arguments.items()}
        with torch.autocast(device, torch.bfloat16):
            result = cross_attention_layer(**arguments, backend=backend)
        assert result.dtype == torch.bfloat16 and torch.equal(result, cross_attention_layer(**halves, backend=backend))


@each_run
def test_the_residual_is_not_overwritten(backend, device):
    """It may be the very tensor of the hidden states."""
    arguments = layer(made(backend, device))
    arguments["residual"] = arguments["hidden_states"]
    before = arguments["residual"].clone()
    cross_attention_layer(**arguments, backend=backend)
    assert torch.equal(arguments["residual"], before)


@each_run
def test_rows_do_not_meet(backend, device):
    """A batch row that is not finite stays alone."""
    arguments = layer(made(backend, device))
    whole = cross_attention_layer(**arguments, backend=backend)
    arguments["value"] = arguments["value"].clone()
    arguments["value"][1] = float("nan")
    result = cross_attention_layer(**arguments, validate=False, backend=backend)
    others = [0, 2, 3]
    assert torch.equal(result[others], whole[others]) and result[1].isnan().all()


@each_form
def test_large_scores_do_not_overflow(backend, device, form):
    arguments = form(made(backend, device, dtype=torch.float16))
    arguments["key"] = 100 * arguments["key"]
    assert torch.isfinite(cross_attention_layer(**arguments, backend=backend)).all()


def leaves(arguments):
    return {name: tensor.clone().requires_grad_() for name, tensor in arguments.items() if tensor is not None}


@pytest.mark.parametrize("form", (layer, absorbed))
@pytest.mark.parametrize("without", ((), ("output_bias", "residual")))
def test_gradients(form, without):
    case = cases.make(B=2, T=3, D=4, H=2, d=2, N=2, channels=3, dtype=torch.float64)
    arguments = {**form(case), **dict.fromkeys(without)}
    given = leaves(arguments)

    def function(*tensors):
        return cross_attention_layer(**{**arguments, **dict(zip(given, tensors))})

    assert torch.autograd.gradcheck(function, tuple(given.values()))
    assert torch.autograd.gradgradcheck(function, tuple(given.values()), fast_mode=True)


def test_gradients_through_absorption():
    case = cases.make(B=2, T=3, D=4, H=2, d=2, N=2, channels=3, dtype=torch.float64)
    names = ("query_weight", "key", "value", "output_weight")
    given = leaves({name: layer(case)[name] for name in names})

    def gradients(**arguments):
        return torch.autograd.grad(cross_attention_layer(**{**layer(case), **arguments}).square().sum(), list(given.values()))

    def through_absorption():
        key, value = absorb_projections(**given)
        return gradients(query_weight=None, key=key, value=value, output_weight=None)

    assert_agree(through_absorption, lambda: gradients(**given))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gradients_of_the_absorbed_form_have_their_argument_dtype(dtype):
    arguments = absorbed(cases.make(dtype=dtype))
    given = leaves(arguments)
    cross_attention_layer(**{**arguments, **given}).float().sum().backward()
    for name, tensor in given.items():
        assert tensor.grad.dtype == dtype and torch.isfinite(tensor.grad).all(), name


def test_opcheck_absorbed():
    arguments = absorbed(cases.make(T=4, D=5, H=2, d=4, N=3))
    arguments = {**arguments, **leaves(arguments), "output_bias": None}
    positional = (*arguments.values(), 1.0)
    outcome = torch.library.opcheck(cases.overload_of("cross_attention_layer"), positional)
    assert set(outcome.values()) == {"SUCCESS"} and len(outcome) == 4


def test_autocast_absorbed_without_bias():
    """Autocast passes over arguments that are not given."""
    arguments = {**absorbed(cases.make()), "output_bias": None}
    halves = {name: tensor if tensor is None else tensor.bfloat16() for name, tensor in arguments.items()}
    expected = cross_attention_layer(**halves)
    with torch.autocast("cpu", torch.bfloat16):
        result = cross_attention_layer(**arguments)
    assert result.dtype == torch.bfloat16 and torch.equal(result, expected)


@each_form
def test_compiles(form, backend, device):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(arguments):
        return cross_attention_layer(**arguments, backend=backend)

    arguments = form(made(backend, device))
    assert torch.equal(compiled(arguments), cross_attention_layer(**arguments, backend=backend))


def test_absorbed_shapes_and_dtypes():
    for dtype in cases.FLOATING:
        case = cases.make(dtype=dtype)
        for tensor in absorb_projections(case.query_weight, case.key, case.value, case.output_weight):
            assert tensor.dtype == dtype and tensor.shape == (4, 13, 3, 29)


def test_refusals():
    case = cases.make()
    arguments = layer(case)
    for missing, other in (("query_weight", "output_weight"), ("output_weight", "query_weight")):
        message = f"cross_attention_layer: {missing} must be given with {other}, or both be None for absorbed"
        with pytest.raises(ValueError, match=re.escape(message)):
            cross_attention_layer(**{**arguments, missing: None})
    message = "key must have shape [B, T, H, C] with B = 4 (from hidden_states), C = 29 (from hidden_states); got [4, 13, 3, 8]"
    with pytest.raises(ValueError, match=re.escape(message)):
        cross_attention_layer(**{**arguments, "query_weight": None, "output_weight": None})
    with pytest.raises(ValueError, match=re.escape("key must have at least one position; got T = 0")):
        cross_attention_layer(**{**arguments, "key": case.key[:, :0], "value": case.value[:, :0]})
    message = "query_weight must have shape [H*d, C] with H = 3 (from key), d = 8 (from key), C = 29 (from hidden_states); got [23, 29]"
    with pytest.raises(ValueError, match=re.escape(message)):
        cross_attention_layer(**{**arguments, "query_weight": case.query_weight[1:]})
    with pytest.raises(TypeError, match="residual must be float32 .as hidden_states.; got float64"):
        cross_attention_layer(**{**arguments, "residual": case.residual.double()})
    message = "absorb_projections: output_weight must have shape [C, H*d]"
    with pytest.raises(ValueError, match=re.escape(message)):
        absorb_projections(case.query_weight, case.key, case.value, case.output_weight[1:])


@pytest.mark.parametrize("name", ("key", "value"))
def test_values_are_checked_on_the_host_or_when_asked(name):
    arguments = layer(cases.make())
    arguments[name] = arguments[name].clone()
    arguments[name][2, 3] = float("nan")
    for validate in (None, True):
        with pytest.raises(ValueError, match=f"cross_attention_layer: {name} must be finite; got another value"):
            cross_attention_layer(**arguments, validate=validate)
    assert cross_attention_layer(**arguments, validate=False)[2].isnan().any()
