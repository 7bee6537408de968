"""`edited_attention`: cross-attention over a short context, with an optional edit of keys and values on the fly."""

from torch import Tensor

from . import sdpa
from .backend import call, register
from .reference import edited_attention as reference
from .registration import Operator
from .shape_checks import FLOATING, INDEX, WIDE, Arguments, dtypes_beside, once
from .validation import check_values, validate_edit, validate_slots


def edited_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gates: Tensor | None = None,
    components: Tensor | None = None,
    index: Tensor | None = None,
    key_outputs: Tensor | None = None,
    key_targets: Tensor | None = None,
    value_outputs: Tensor | None = None,
    value_targets: Tensor | None = None,
    slots: Tensor | None = None,
    query_regions: Tensor | None = None,
    key_regions: Tensor | None = None,
    scale: float | None = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale · q K̃ᵀ) Ṽ, with K̃ = K + Σ_j (g_j key_outputs_j - a_j key_targets_j), and Ṽ likewise.

    Without the edit arguments it is plain attention. With `gates`, `components` and `index`, the pair
    of key tables, the pair of value tables, or both must be given; the other side stays as it is. There
    is no padding mask: the models concerned attend to all T positions.

    Args:
        query [B, N, H, d], key, value [P, T, H, d]: one dtype of float16, bfloat16, float32, float64; any
            strides; T >= 1. Without slots P = B.
        gates, components [P, T, J]: from `concept_gates`; float32 or float64; not read where index is -1.
        index [P, J]: int32, the bank slots a row of key and value uses, -1 for none. Any J, 0 included.
        key_outputs, key_targets, value_outputs, value_targets [S, H*d]: o* and W i* of this layer, columns in the
            order of key.flatten(2); any of the four dtypes, all the same.
        slots [B]: int32, the row of key, value, gates, components and index that a row of query reads, in 0 … P - 1.
            None: row b reads row b.
        query_regions [B, N], key_regions [B, T]: int32, a set of bits for each image token and each text position; both or
            neither. Token n attends to position t if key_regions[b, t] is 0 or shares a bit with query_regions[b, n];
            the others get weight 0, and a token that may attend to no position gets 0.
        scale: None means d ** -0.5.
        validate: whether to check values (index and slots in range, gates and components finite), which waits for
            the device. None: on ordinary host tensors outside torch.compile only, and not again until one is written
            in place as torch counts it, so not through `.data` or numpy.
        backend: "cuda", "triton" or "reference"; None chooses. On a CPU, None is torch's scaled_dot_product_attention
            (sdpa.py), unless the call will be differentiated or runs under autocast.

    Returns:
        [B, N, H, d], contiguous, in the dtype of query; under autocast, in autocast's, to which query, key
        and value are cast. Edit, softmax and sums in at least float32. A batch row without a concept is bit
        for bit what the call without edit arguments gives on the same backend. Differentiable in every tensor but index,
        slots and regions.

    Raises:
        TypeError, ValueError: an argument breaks a rule above. BackendUnavailable: see `use_backend`.

    Unchecked, a batch row whose slot is out of range gives 0, and an index out of range acts as -1.

    Source: arXiv 2305.01644, eq. 3 and 4, written as an update of rank 2J of K and V; regions: DESIGN.md, "Regions".
    """
    edit = (gates, components, index, key_outputs, key_targets, value_outputs, value_targets)
    unedited = gates is components is index is key_outputs is key_targets is value_outputs is value_targets is None
    if unedited and slots is query_regions is key_regions is None and query.is_cpu:
        # the fast path of pipelines on a CPU: every layer calls it at every step, and Python overhead is a visible share of its time
        _check(query, key, value)
        if sdpa.preferred((query, key, value), backend):
            return sdpa.plain(query, key, value, query.shape[-1] ** -0.5 if scale is None else float(scale))
    tensors = (query, key, value, *edit, slots, query_regions, key_regions)
    _check(*tensors)
    if index is not None:
        bank = (value_outputs if key_outputs is None else key_outputs).shape[0]
        check_values(validate_edit, "edited_attention", validate, tensors, (index, gates, components), bank)
    if slots is not None:
        check_values(validate_slots, "edited_attention", validate, tensors, (slots,), key.shape[0])
    arguments = (*tensors, query.shape[-1] ** -0.5 if scale is None else float(scale))
    if sdpa.preferred(arguments, backend):
        return sdpa.edited_attention(*arguments)
    return call("edited_attention", arguments, backend)


@once
def _check(query: Tensor, key: Tensor, value: Tensor, *optional: Tensor | None) -> None:
    *edit, slots, query_regions, key_regions = optional or (None,) * 10
    check = Arguments("edited_attention")
    check("query", query, "B N H d", FLOATING)
    if slots is not None:
        check("slots", slots, "B", INDEX)
    rows = "B" if slots is None else "P"
    check("key", key, f"{rows} T H d", dtypes_beside(query), "as query")
    check("value", value, f"{rows} T H d", dtypes_beside(query), "as query")
    if key.shape[1] == 0:
        raise ValueError("edited_attention: key must have at least one position; got T = 0")
    if any(argument is not None for argument in edit):
        _check_edit(check, rows, *edit)
    regions = {"query_regions": query_regions, "key_regions": key_regions}
    if any(each is not None for each in regions.values()):
        for name, other, letters in (("query_regions", "key_regions", "B N"), ("key_regions", "query_regions", "B T")):
            if regions[name] is None:
                raise ValueError(f"edited_attention: {name} must be given with {other}; got None")
            check(name, regions[name], letters, INDEX)


def _check_edit(check, rows, gates, components, index, key_outputs, key_targets, value_outputs, value_targets):
    for name, argument in (("gates", gates), ("components", components), ("index", index)):
        if argument is None:
            raise ValueError(f"edited_attention: {name} must be given with the other edit arguments; got None")
    pairs = {
        ("key_outputs", "key_targets"): (key_outputs, key_targets),
        ("value_outputs", "value_targets"): (value_outputs, value_targets),
    }
    if all(table is None for pair in pairs.values() for table in pair):
        raise ValueError(
            "edited_attention: gates need tables to act on; give key_outputs and key_targets,"
            " value_outputs and value_targets, or all four"
        )
    check("gates", gates, f"{rows} T J", WIDE, "as concept_gates returns them")
    check("components", components, f"{rows} T J", (gates.dtype,), "as gates")
    check("index", index, f"{rows} J", INDEX)
    dtypes, why = FLOATING, ""
    for names, pair in pairs.items():
        for name, other, table in zip(names, reversed(names), pair):
            if table is not None:
                check(name, table, "S H*d", dtypes, why)
                dtypes, why = (table.dtype,), "as the tables before it"
            elif any(table is not None for table in pair):
                raise ValueError(f"edited_attention: {name} must be given with {other}; got None")


def _fake(query, *rest):
    return query.new_empty(query.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, gradient):
    return reference.edited_attention_backward(gradient, *ctx.saved_tensors, ctx.scale, ctx.needs_input_grad)


OPERATOR = Operator("edited_attention", _fake, _setup_context, _backward, autocast=("query", "key", "value"))
register("reference", OPERATOR, reference.edited_attention)
