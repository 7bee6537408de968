"""What every operator promises on every backend beside its results: equal bits, and one graph for any number of rows."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend

import perfusion_kernels

from . import cases
from .test_floor import call, each_run, gradients


@each_run
def test_equal_calls_give_equal_bits(operator, backend, device):
    """Slots that rows share included: no sum is left to chance, forward or backward."""
    case = cases.make(J=2, S=3, T=11, H=1, N=5, device=device, backend=backend)
    results = [call(operator, case.arguments(operator), backend=backend) + gradients(operator, case, backend) for _ in range(2)]
    assert all(torch.equal(mine, other) for mine, other in zip(*results))


@each_run
def test_one_graph_serves_any_number_of_rows(operator, backend, device):
    """Marked dynamic, the number of batch rows is no part of the graph; no check turns it into a number."""
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(arguments):
        return call(operator, arguments)

    shared = ("targets", "weight", "outputs", "output_bias")  # what has no B
    with perfusion_kernels.use_backend(backend):
        for B in (2, 3, 5):
            arguments = cases.make(B=B, T=5, D=6, H=1, N=3, device=device, backend=backend).arguments(operator)
            for name, tensor in arguments.items():
                if not name.endswith(shared):
                    torch._dynamo.mark_dynamic(tensor, 0)
            for mine, eager in zip(compiled(arguments), call(operator, arguments)):
                assert torch.equal(mine, eager)
    assert counter.frame_count == 1
