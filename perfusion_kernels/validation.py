"""Checks of tensor values. They synchronise with the device, so operators do not run them.

The public functions run them when `validate` is True, in every call; and when it is None and every tensor is an
ordinary one in host memory, outside `torch.compile`. In the latter case a check that passed is skipped while its tensors
are the same objects at the same `_version`. Writes that the version counter does not see (`.data`, numpy, DLPack, a fused
optimiser, another process) are missed; after those, call with `validate=True`. For tensors on a GPU call
`validate_concepts` once, at a point where synchronising is cheap.

Tensors are remembered by weak references; `torch.utils.swap_tensors` raises for tensors that have one.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from .tensor_version import Marks, marks, unchanged

MAX_CONDITION = 1e3
"""Largest accepted condition number of a row's Gram matrix: components in float32 are then right to about 5e-5."""

REMEMBERED = 4096
"""Capacity of the cache of passed checks: more than one step of any model makes, a few megabytes at most."""

_passed: dict[tuple, Marks] = {}


def check_values(
    check: Callable[..., None],
    operator: str,
    validate: bool | None,
    arguments: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    *sizes: int,
) -> None:
    """Runs `check(operator, *tensors, *sizes)` if `validate` is True, or if it is None and the check is not cached as passed.

    arguments: all arguments of the call; with None, the check runs only if all are ordinary tensors in host memory.
    tensors, sizes: everything that the check reads.
    """
    if validate is None:
        if torch.compiler.is_compiling():
            return
        key = (operator, sizes, *map(id, tensors))
        passed = _passed.get(key)
        if passed is not None and unchanged(tensors, passed):
            return
        if not all(_is_plain(tensor) for tensor in arguments if tensor is not None):
            return
        before = marks(tensors)  # taken first, so that a concurrent write during the check invalidates the cached result
        check(operator, *tensors, *sizes)
        if before is not None:
            if len(_passed) >= REMEMBERED:
                _passed.clear()
            _passed[key] = before
    elif validate:
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{operator}: validate=True looks at values, which torch.compile cannot; call validate_concepts before"
            )
        check(operator, *tensors, *sizes)


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.is_cpu
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def validate_concepts(
    targets: Tensor,
    metric_targets: Tensor,
    index: Tensor,
    *,
    encodings: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: Tensor | None = None,
    names: Sequence[str] | None = None,
    max_condition: float = MAX_CONDITION,
    operator: str = "validate_concepts",
) -> None:
    """Raises ValueError for values from which gates and components cannot be computed. Synchronises with the device.

    targets, metric_targets [S, D], index [B, J], encodings [B, T, D], bias and temperature [B, J]: as for
        `concept_gates`.
    names: S names for the error messages; without them concepts are named by slot.
    max_condition: largest accepted condition number of a row's Gram matrix.

    Raises ValueError, naming `operator`, the argument, the rule and what came, when an index is out of
    range; when a value that is used is not finite; when a temperature or the energy i*·C⁻¹i* of a
    concept is not positive; when the concepts of one row are so nearly dependent that the components
    would be noise (DESIGN.md, "Independent concepts").
    """
    validate_index(operator, index, targets.shape[0])
    present = index >= 0
    if encodings is not None:
        _require_finite(operator, "encodings", encodings)
    for name, values in (("bias", bias), ("temperature", temperature)):
        if values is not None:
            _require_finite(operator, name, values[present])
    if temperature is not None and (wrong := present & (temperature <= 0)).any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{operator}: temperature must be positive;"
            f" got {temperature[row, column].item():g} at row {row}, place {column}"
        )

    def name_of(slot: int) -> str:
        return f"slot {slot}" if names is None else repr(names[slot])

    slots = index[present].unique().tolist()
    energies = (targets[slots].double() * metric_targets[slots].double()).sum(-1)
    for argument, table in (("targets", targets), ("metric_targets", metric_targets)):
        finite = table[slots].isfinite().all(-1).tolist()
        for slot, good in zip(slots, finite):
            if not good:
                raise ValueError(f"{operator}: {argument} must be finite; got another value in {name_of(slot)}")
    for slot, energy in zip(slots, energies.tolist()):
        if not energy > 0:
            raise ValueError(
                f"{operator}: the energy targets · metric_targets must be positive; got {energy:g} in {name_of(slot)}"
                " (an empty slot, or metric_targets that are not targets @ C⁻¹)"
            )
    for row, members in enumerate(index.tolist()):
        members = [slot for slot in members if slot >= 0]
        dependent = dependent_concepts(targets[members], metric_targets[members], max_condition)
        if dependent:
            raise ValueError(
                f"{operator}: the concepts of one row must be independent; in row {row}"
                f" {', '.join(name_of(members[i]) for i in dependent)} are copies of each other or nearly so"
                f" (Gram condition above {max_condition:g})"
            )


def validate_edit(operator: str, index: Tensor, gates: Tensor, components: Tensor, slots: int) -> None:
    """Raises ValueError for an index out of range, and for gates or components that are used but not finite."""
    validate_index(operator, index, slots)
    present = index >= 0
    for name, values in (("gates", gates), ("components", components)):
        if not torch.where(present[:, None], values, 0).isfinite().all():
            raise ValueError(f"{operator}: {name} must be finite where index names a concept")


def validate_places(operator: str, places: Tensor, floor: Tensor | None, index: Tensor, T: int) -> None:
    """Raises ValueError for a place that is no text position, and for a floor outside of 0 … 1, where index names a concept."""
    present = index >= 0
    used = places[present]
    if used.numel() and (used.min() < -1 or used.max() >= T):
        raise ValueError(
            f"{operator}: places must lie in -1 … {T - 1} (T = {T}); got values from {used.min().item()} to {used.max().item()}"
        )
    if floor is not None and not ((floor[present] >= 0) & (floor[present] <= 1)).all():
        wrong = (present & ~((floor >= 0) & (floor <= 1))).nonzero()[0].tolist()
        raise ValueError(
            f"{operator}: floor must lie in 0 … 1; got {floor[tuple(wrong)].item():g} at row {wrong[0]}, place {wrong[1]}"
        )


def validate_slots(operator: str, slots: Tensor, rows: int) -> None:
    """Raises ValueError for a slot that is no row of keys and values."""
    if slots.numel() and (slots.min() < 0 or slots.max() >= rows):
        raise ValueError(
            f"{operator}: slots must lie in 0 … {rows - 1} (P = {rows} rows of key and value);"
            f" got values from {slots.min().item()} to {slots.max().item()}"
        )


def validate_index(operator: str, index: Tensor, slots: int) -> None:
    if index.numel() and (index.min() < -1 or index.max() >= slots):
        raise ValueError(
            f"{operator}: index must lie in -1 … {slots - 1} (S = {slots});"
            f" got values from {index.min().item()} to {index.max().item()}"
        )


def _require_finite(operator: str, name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"{operator}: {name} must be finite; got {int((~tensor.isfinite()).sum())} other values")


def dependent_concepts(targets: Tensor, metric_targets: Tensor, max_condition: float = MAX_CONDITION) -> list[int]:
    """The rows of targets [J, D] that make their Gram matrix nearly singular; none if it is not.

    The Gram matrix is normalised, so that only angles in the metric C⁻¹ count, neither the lengths of
    the targets nor any scale of the rows of metric_targets.
    """
    if targets.shape[0] < 2:
        return []
    ratios = metric_targets.double() @ targets.double().T
    ratios = ratios / ratios.diagonal()[:, None]  # c_j(i*_k); its product with its transpose is cos²
    cosines = ratios.sign() * (ratios * ratios.T).clamp(min=0).sqrt()
    values, vectors = torch.linalg.eigh((cosines + cosines.T) / 2)
    if values[0] * max_condition >= values[-1]:
        return []
    share = vectors[:, 0].abs()
    return (share > 0.1 * share.max()).nonzero().flatten().tolist()
