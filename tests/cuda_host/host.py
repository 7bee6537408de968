"""The CUDA kernels as they run on the CPU, called with tensors; and their results held against the plain formula."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import cases, plain
from ..kernels.tolerance import assert_no_worse, exactly
from .c_api import CApi, Refused, params  # noqa: F401  Refused: for the tests

ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}


class Host:
    """One build of the host library. Tensors are those of the public functions, by name; results are NaN at first."""

    def __init__(self, module):
        self.module = module
        self.api = CApi(module.__loader__.path)
        self.configure()

    def configure(
        self,
        multiprocessors: int = 2,
        shared_per_block: int = 232448,
        order: str = "forward",
        shared_per_multiprocessor: int = 233472,
        cache: int = 0,
    ) -> None:
        """The machine to run on, and which of its threads goes first; counters start at 0.

        multiprocessors: 0 for one block a head. cache: bytes of the second-level cache; 0 counts no traffic, and runs a block at a time.
        """
        self.module.configure(multiprocessors, shared_per_block, shared_per_multiprocessor, ORDERS[order], cache)

    def counted(self) -> dict[str, int]:
        return self.module.counted()

    def planned(self, operator: str, tensors: dict[str, Tensor | None], **sizes: int) -> dict[str, int]:
        """The launch plan of a call."""
        call = params(operator, tensors, **sizes)
        return getattr(self.module, f"plan_{operator}")(ctypes.addressof(call))

    def plan(self, **tensors: Tensor | None) -> dict[str, int]:
        return self.planned("edited_attention", tensors)

    def fused_plan(self, **tensors: Tensor | None) -> dict[str, int]:
        return self.planned("fused_edited_attention", tensors)

    def plan_projection(self, **tensors: Tensor | None) -> dict[str, int]:
        return self.planned("edited_projection", tensors)

    def gates_workspace_bytes(self, **tensors: Tensor) -> int:
        return self.api.workspace_bytes("concept_gates", tensors)

    def projection_workspace_bytes(self, **tensors: Tensor) -> int:
        encodings, weight = tensors["encodings"], tensors["weight"]
        return self.api.workspace_bytes("edited_projection_backward", {**tensors, "gradient": _columns(encodings, weight)})

    def _run(self, operator: str, tensors: dict[str, Tensor | None], workspace: Tensor | None = None, **numbers) -> None:
        if workspace is not None:
            numbers |= {"workspace": workspace.data_ptr(), "workspace_bytes": workspace.numel() * workspace.element_size()}
        self.api(operator, params(operator, tensors, **numbers))

    def edited_attention(self, *, scale: float = 0.3, output: Tensor | None = None, **tensors: Tensor | None) -> Tensor:
        return self._attention("edited_attention", tensors, output, scale)

    def fused_edited_attention(self, *, scale: float = 0.3, output: Tensor | None = None, **tensors: Tensor | None) -> Tensor:
        return self._attention("fused_edited_attention", tensors, output, scale)

    def _attention(self, operator: str, tensors: dict[str, Tensor | None], output: Tensor | None, scale: float) -> Tensor:
        output = _unwritten(tensors["query"]) if output is None else output
        self._run(operator, {**tensors, "output": output}, scale=scale)
        return output

    def edited_projection(self, *, result: Tensor | None = None, **tensors: Tensor | None) -> Tensor:
        return self._projection("edited_projection", tensors, result)

    def fused_edited_projection(self, *, result: Tensor | None = None, **tensors: Tensor | None) -> Tensor:
        return self._projection("fused_edited_projection", tensors, result)

    def _projection(self, operator: str, tensors: dict[str, Tensor | None], result: Tensor | None) -> Tensor:
        result = _columns(tensors["encodings"], tensors["weight"]) if result is None else result
        self._run(operator, {**tensors, "result": result})
        return result

    def concept_gates(self, workspace: Tensor | None = None, **tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        """The workspace is NaN, of the bytes that are asked for, if it is not given."""
        shape = (*tensors["encodings"].shape[:2], tensors["index"].shape[1])
        results = {name: torch.full(shape, torch.nan) for name in ("gates", "components")}
        workspace = torch.full((self.gates_workspace_bytes(**tensors) // 4,), torch.nan) if workspace is None else workspace
        self._run("concept_gates", {**tensors, **results}, workspace)
        return results["gates"], results["components"]

    def edited_projection_backward(
        self, gradient: Tensor, needs: Sequence[str], results: dict[str, Tensor] = {}, workspace: Tensor | None = None, **tensors: Tensor | None
    ) -> dict[str, Tensor]:
        """The gradients of the public function's arguments that are named, and those in `results`, which are written there."""
        found = {name: _unwritten(tensors[name]) for name in needs} | results
        workspace = torch.full((self.projection_workspace_bytes(**tensors) // 4,), torch.nan) if workspace is None else workspace
        call = {**tensors, "gradient": gradient, **{f"{name}_gradient": x for name, x in found.items()}}
        self._run("edited_projection_backward", call, workspace, D=tensors["encodings"].shape[2])
        return found


def _unwritten(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan, memory_format=torch.contiguous_format)


def _columns(encodings: Tensor, weight: Tensor) -> Tensor:
    return torch.full((*encodings.shape[:2], weight.shape[0]), torch.nan, dtype=encodings.dtype)


def written_plainly(operator: str, arguments: dict[str, Tensor]) -> tuple[Tensor, ...]:
    result = getattr(plain, operator)(*cases.positional(operator, arguments))
    return result if isinstance(result, tuple) else (result,)


def compare(host: Host, operator: str, case: cases.Case) -> None:
    """The kernel against the plain formula of the same dtype, both against float64: over all, and for each concept."""
    arguments = case.arguments(operator)
    actual = getattr(host, operator)(**arguments)
    same = written_plainly(operator, arguments)
    exact = exactly(written_plainly, operator, case.double().arguments(operator))
    for mine, naive, truth in zip(actual if isinstance(actual, tuple) else (actual,), same, exact):
        if mine.numel():
            assert_no_worse(mine, naive, truth, case.index)
