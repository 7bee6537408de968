"""The CUDA kernels as they run on the CPU, called with tensors; and their results held against the plain formula."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import cases, plain
from ..kernels.tolerance import assert_no_worse, exactly

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.int32: 3}
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}


class Refused(RuntimeError):
    """A status other than OK, with its message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Host:
    """One build of the host library."""

    def __init__(self, module):
        self.module = module
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

    def edited_attention(self, *, scale: float = 0.3, output: Tensor | None = None, **tensors: Tensor | None) -> Tensor:
        """The public function's tensors by name -> [B, N, H, d]. `output` is written if given, else NaN is at first."""
        sizes, given = attention_call(tensors, output)
        _raise(self.module.edited_attention(sizes, described(given), scale))
        return given["output"]

    def fused_edited_attention(self, *, scale: float = 0.3, output: Tensor | None = None, **tensors: Tensor | None) -> Tensor:
        sizes, given = fused_call(tensors, output)
        _raise(self.module.fused_edited_attention(sizes, described(given), scale))
        return given["output"]

    def fused_plan(self, **tensors: Tensor) -> dict:
        sizes, given = fused_call(tensors, None)
        return self.module.plan_fused_edited_attention(sizes, described(given))

    def plan(self, **tensors: Tensor) -> dict:
        sizes, given = attention_call(tensors, None)
        return self.module.plan_edited_attention(sizes, described(given))

    def concept_gates(self, workspace: Tensor | None = None, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The workspace is NaN, of the bytes that are asked for, if it is not given."""
        sizes = gates_sizes(tensors)
        results = {name: torch.full((sizes["B"], sizes["T"], sizes["J"]), torch.nan) for name in ("gates", "components")}
        workspace = torch.full((self.gates_workspace_bytes(**tensors) // 4,), torch.nan) if workspace is None else workspace
        sizes["workspace_bytes"] = 4 * workspace.numel()
        _raise(self.module.concept_gates(sizes, described({**tensors, **results, "workspace": workspace})))
        return results["gates"], results["components"]

    def gates_workspace_bytes(self, **tensors: Tensor) -> int:
        status, message, count = self.module.concept_gates_workspace(gates_sizes(tensors), {})
        _raise((status, message))
        return count

    def edited_projection(self, *, result: Tensor | None = None, **tensors: Tensor | None) -> Tensor:
        """The public function's tensors by name -> [B, T, O]. `result` is written if given, else NaN is at first."""
        sizes, given = projection_call(tensors, result)
        _raise(self.module.edited_projection(sizes, described(given)))
        return given["result"]

    def projection_workspace_bytes(self, **tensors: Tensor) -> int:
        status, message, count = self.module.edited_projection_backward_workspace(projection_call(tensors, tensors["encodings"])[0], {})
        _raise((status, message))
        return count

    def edited_projection_backward(
        self, gradient: Tensor, needs: Sequence[str], results: dict[str, Tensor] = {}, workspace: Tensor | None = None, **tensors: Tensor
    ) -> dict[str, Tensor]:
        """The gradients of the public function's arguments that are named, and those in `results`, which are written there.

        What is not given is NaN at first, the workspace too.
        """
        sizes, given = projection_call(tensors, gradient)
        sizes["S"] = given["outputs"].shape[0] if "outputs" in given else 0
        found = {name: torch.full_like(given[name], torch.nan, memory_format=torch.contiguous_format) for name in needs} | results
        call = {**given, "gradient": gradient, **{f"{name}_gradient": x for name, x in found.items()}}
        workspace = torch.full((self.projection_workspace_bytes(**tensors) // 4,), torch.nan) if workspace is None else workspace
        sizes["workspace_bytes"] = 4 * workspace.numel()
        _raise(self.module.edited_projection_backward(sizes, described({**call, "workspace": workspace})))
        return found

    def plan_projection(self, **tensors: Tensor | None) -> dict[str, int]:
        sizes, given = projection_call(tensors, None)
        return self.module.plan_edited_projection(sizes, described(given))


def gates_sizes(tensors: dict[str, Tensor]) -> dict[str, int]:
    (B, T, D), (S, _), J = tensors["encodings"].shape, tensors["targets"].shape, tensors["index"].shape[1]
    return dict(B=B, T=T, D=D, J=J, S=S)


def projection_call(tensors: dict[str, Tensor | None], result: Tensor | None) -> tuple[dict[str, int], dict[str, Tensor]]:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (B, T, D), O = given["encodings"].shape, given["weight"].shape[0]
    sizes = dict(B=B, T=T, D=D, O=O, J=given["index"].shape[1] if "index" in given else 0)
    given["result"] = torch.full((B, T, O), torch.nan, dtype=given["encodings"].dtype) if result is None else result
    return sizes, given


def attention_call(tensors: dict[str, Tensor | None], output: Tensor | None) -> tuple[dict[str, int], dict[str, Tensor]]:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    query = given["query"]
    B, N, H, d = query.shape
    T = given["key" if "key" in given else "encodings"].shape[1]
    sizes = dict(B=B, N=N, H=H, d=d, T=T, J=given["index"].shape[1] if "index" in given else 0)
    given["output"] = torch.full((B, N, H, d), torch.nan, dtype=query.dtype) if output is None else output
    return sizes, given


def fused_call(tensors: dict[str, Tensor | None], output: Tensor | None) -> tuple[dict[str, int], dict[str, Tensor]]:
    sizes, given = attention_call(tensors, output)
    return {**sizes, "D": given["encodings"].shape[2]}, given


def described(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: (tensor.data_ptr(), DTYPES[tensor.dtype], list(tensor.stride())) for name, tensor in tensors.items()}


def _raise(outcome: tuple[int, str]) -> None:
    if outcome[0]:
        raise Refused(*outcome)


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
