"""The schema of every operator, once.

An operator is registered as one overload per backend, `perfusion_kernels::<operator>.<backend>`, and
every overload has the schema written here. Optional tensors are None where the call has no edit, slots or regions. Tensors
come first. Where a backend has kernels for derivatives, these are an operator of their own; `backward_schema` derives its schema.
"""

import re

SCHEMAS = {
    "concept_gates": (
        "(Tensor encodings, Tensor targets, Tensor metric_targets, Tensor index, Tensor bias,"
        " Tensor temperature, Tensor? places, Tensor? floor) -> (Tensor gates, Tensor components)"
    ),
    "edited_projection": (
        "(Tensor encodings, Tensor weight, Tensor gates, Tensor components, Tensor index,"
        " Tensor outputs, Tensor projected_targets) -> Tensor"
    ),
    "fused_edited_projection": (
        "(Tensor encodings, Tensor weight, Tensor gates, Tensor components, Tensor index,"
        " Tensor outputs, Tensor projected_targets) -> Tensor"
    ),
    "edited_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor? gates, Tensor? components, Tensor? index,"
        " Tensor? key_outputs, Tensor? key_targets, Tensor? value_outputs, Tensor? value_targets,"
        " Tensor? slots, Tensor? query_regions, Tensor? key_regions, float scale) -> Tensor"
    ),
    "fused_edited_attention": (
        "(Tensor query, Tensor encodings, Tensor key_weight, Tensor value_weight, Tensor gates,"
        " Tensor components, Tensor index, Tensor key_outputs, Tensor key_targets,"
        " Tensor value_outputs, Tensor value_targets, float scale) -> Tensor"
    ),
    "cross_attention_layer": (
        "(Tensor hidden_states, Tensor? query_weight, Tensor key, Tensor value, Tensor? output_weight,"
        " Tensor? output_bias, Tensor? residual, float scale) -> Tensor"
    ),
}


def backward_schema(operator: str) -> str:
    """The schema of `<operator>_backward`: gradients of the results, the operator's arguments, and which gradients are needed."""
    arguments, results = SCHEMAS[operator].removeprefix("(").split(") -> ")
    gradients = [f"Tensor {name}_gradient" for name in re.findall(r"Tensor (\w+)", results)] or ["Tensor gradient"]
    return f"({', '.join(gradients)}, {arguments}, bool[] needs) -> Tensor[]"
