"""The CUDA kernels as they run on the CPU, called with tensors; and their results held against the plain formula."""

import ctypes
from collections.abc import Sequence
from functools import partialmethod

import torch
from torch import Tensor

from perfusion_kernels.reference.edited_projection import edited_projection_backward

from ..kernels import cases, plain
from ..kernels.tolerance import assert_no_worse, exactly
from .c_api import CApi, Refused, params  # noqa: F401  Refused: for the tests

ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}
NEEDS = ("encodings", "gates", "components", "outputs", "projected_targets")  # derivatives of edited_projection that there are
RESULTS = {
    "concept_gates": ("gates", "components"),
    **dict.fromkeys(("edited_projection", "fused_edited_projection"), ("result",)),
    **dict.fromkeys(("edited_attention", "fused_edited_attention"), ("output",)),
    "edited_projection_backward": ("encodings", "weight", "gates", "components", "index", "outputs", "projected_targets"),
}


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

        multiprocessors: 0 for one block a head. cache: bytes of L2; 0 counts no traffic, and runs a block at a time.
        """
        self.module.configure(multiprocessors, shared_per_block, shared_per_multiprocessor, ORDERS[order], cache)

    def counted(self) -> dict[str, int]:
        return self.module.counted()

    def planned(self, operator: str, tensors: dict[str, Tensor | None], **sizes: int) -> dict[str, int]:
        """The launch plan of a call."""
        call = params(operator, tensors, **sizes)
        return getattr(self.module, f"plan_{operator}")(ctypes.addressof(call))

    def workspace_bytes(self, operator: str, **tensors: Tensor) -> int:
        return self.api.workspace_bytes(operator, tensors)

    def _run(self, operator: str, tensors: dict[str, Tensor | None], workspace: Tensor | None = None, **numbers) -> None:
        if workspace is not None:
            numbers |= {"workspace": workspace.data_ptr(), "workspace_bytes": workspace.numel() * workspace.element_size()}
        self.api(operator, params(operator, tensors, **numbers))

    def _attention(self, operator: str, *, scale: float = 0.3, output: Tensor | None = None, **tensors: Tensor | None) -> Tensor:
        output = _unwritten(tensors["query"]) if output is None else output
        self._run(operator, {**tensors, "output": output}, scale=scale)
        return output

    edited_attention = partialmethod(_attention, "edited_attention")
    fused_edited_attention = partialmethod(_attention, "fused_edited_attention")

    def _projection(self, operator: str, *, result: Tensor | None = None, **tensors: Tensor | None) -> Tensor:
        result = _columns(tensors["encodings"], tensors["weight"]) if result is None else result
        self._run(operator, {**tensors, "result": result})
        return result

    edited_projection = partialmethod(_projection, "edited_projection")
    fused_edited_projection = partialmethod(_projection, "fused_edited_projection")

    def concept_gates(self, workspace: Tensor | None = None, **tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        """The workspace is NaN, of the bytes that are asked for, if it is not given."""
        shape = (*tensors["encodings"].shape[:2], tensors["index"].shape[1])
        results = {name: torch.full(shape, torch.nan) for name in ("gates", "components")}
        workspace = torch.full((self.workspace_bytes("concept_gates", **tensors) // 4,), torch.nan) if workspace is None else workspace
        self._run("concept_gates", {**tensors, **results}, workspace)
        return results["gates"], results["components"]

    def edited_projection_backward(
        self, needs: Sequence[str] = NEEDS, results: dict[str, Tensor] = {}, workspace: Tensor | None = None, **tensors: Tensor | None
    ) -> dict[str, Tensor]:
        """The gradients of the public function's arguments that are named, and those in `results`, which are written there."""
        found = {name: _unwritten(tensors[name]) for name in needs} | results
        if workspace is None:
            workspace = torch.full((self.workspace_bytes("edited_projection_backward", **tensors) // 4,), torch.nan)
        call = {**tensors, **{f"{name}_gradient": x for name, x in found.items()}}
        self._run("edited_projection_backward", call, workspace, D=tensors["encodings"].shape[2])
        return found


def _unwritten(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan, memory_format=torch.contiguous_format)


def _columns(encodings: Tensor, weight: Tensor) -> Tensor:
    return torch.full((*encodings.shape[:2], weight.shape[0]), torch.nan, dtype=encodings.dtype)


def arguments_of(operator: str, case: cases.Case) -> dict[str, Tensor | None]:
    """The public function's; of the derivatives, with the gradient of a result."""
    if operator != "edited_projection_backward":
        return case.arguments(operator)
    arguments = case.arguments("edited_projection")
    gradient = _columns(arguments["encodings"], arguments["weight"])
    return {"gradient": torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).to(gradient.dtype), **arguments}


def run(host: Host, operator: str, arguments: dict[str, Tensor | None], **options) -> dict[str, Tensor]:
    """The results by name."""
    found = getattr(host, operator)(**arguments, **options)
    return found if isinstance(found, dict) else dict(zip(RESULTS[operator], _tuple(found), strict=True))


def written_plainly(operator: str, arguments: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """In the order of RESULTS."""
    if operator == "edited_projection_backward":
        forward = {name: x for name, x in arguments.items() if name != "gradient"}
        return edited_projection_backward(arguments["gradient"], *cases.positional("edited_projection", forward), (True,) * 7)
    return _tuple(getattr(plain, operator)(*cases.positional(operator, arguments)))


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def compare(host: Host, operator: str, case: cases.Case, **options) -> None:
    """The kernel against the plain formula of the same dtype, both against float64: over all, and for each concept."""
    arguments = arguments_of(operator, case)
    doubled = {name: x.double() if x is not None and x.is_floating_point() else x for name, x in arguments.items()}
    naive, exact = written_plainly(operator, arguments), exactly(written_plainly, operator, doubled)
    found = run(host, operator, arguments, **options)
    for name, same, truth in zip(RESULTS[operator], naive, exact):
        if name in found and found[name].numel():
            of_slots = operator == "edited_projection_backward" and name in ("outputs", "projected_targets")
            assert_no_worse(found[name], same, truth, torch.arange(len(truth.value))[:, None] if of_slots else case.index)
