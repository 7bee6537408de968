"""The edit's arguments as one tuple: the schemas of attention have them as seven arguments."""

from typing import NamedTuple

from torch import Tensor


class Edit(NamedTuple):
    """In the order of the schemas. All None without an edit; a side's tables are None where it stays as it is.

    gates, components [P, T, J], index [P, J]; the tables [S, H*d].
    """

    gates: Tensor | None
    components: Tensor | None
    index: Tensor | None
    key_outputs: Tensor | None
    key_targets: Tensor | None
    value_outputs: Tensor | None
    value_targets: Tensor | None


Side = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""gates, components, index, and the outputs and targets of keys or of values: what `rank_one_update` takes."""


def unpacked(arguments: tuple) -> tuple:
    """Splits the arguments behind the edited tensors, in the schema's order, into the edit and the rest."""
    return Edit(*arguments[:7]), *arguments[7:]


def of_keys(edit: Edit) -> Side:
    return edit.gates, edit.components, edit.index, edit.key_outputs, edit.key_targets


def of_values(edit: Edit) -> Side:
    return edit.gates, edit.components, edit.index, edit.value_outputs, edit.value_targets
