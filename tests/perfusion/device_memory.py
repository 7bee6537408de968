"""A device whose memory is counted: torch's meta device, which has shapes and no numbers, in the place of a GPU.

    with Counted() as device:
        pipe.to("meta")
        ...                      # the product's own code, its moves between device and CPU included
    device.peak                  # bytes

What is copied to the CPU is zeros there, but for token ids, and a number that is read is 1. Attention is fused. What libraries take beside tensors,
workspaces of convolutions say, is not in it.
"""

import contextlib
import weakref
from unittest import mock

import torch
import torch.fx.experimental._config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from perfusion.memory import FusedAttention


class Counted(TorchDispatchMode):
    """Bytes of all tensors on `kind`: `now`, and the most there were, `peak`. On a CPU, of those that were made in here."""

    def __init__(self, kind="meta"):
        super().__init__()
        self.kind, self.now, self.peak, self._known, self._ids = kind, 0, 0, {}, {}

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        if self.kind == "meta":
            self._stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _fused))
            autocast = torch.autocast
            self._stack.enter_context(
                mock.patch.object(torch, "autocast", lambda kind, **options: contextlib.nullcontext() if kind == "meta" else autocast(kind, **options))
            )
            self._stack.enter_context(mock.patch.object(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True))
            # a module's parameters are the same objects on both sides, as they are when CPU and GPU exchange them
            before = torch.__future__.get_swap_module_params_on_conversion()
            torch.__future__.set_swap_module_params_on_conversion(True)
            self._stack.callback(torch.__future__.set_swap_module_params_on_conversion, before)
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._stack.close()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.kind == "meta":
            given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
            if function is torch.ops.aten._local_scalar_dense.default and given[0].is_meta:
                return torch.ones((), dtype=given[0].dtype).item()
            if function is torch.ops.aten._to_copy.default and given[0].is_meta and str(kwargs.get("device")) == "cpu":
                ids = self._ids.get(given[0].untyped_storage()._cdata)
                if ids is not None and ids.shape == given[0].shape:
                    return ids
                return torch.zeros(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)  # calloc: no page of it is touched
            if function is torch.ops.aten.copy_.default and given[1].is_meta and not given[0].is_meta:
                return given[0]
        result = function(*args, **kwargs)
        tree_map_only(torch.Tensor, self.count, result)
        if self.kind == "meta" and function is torch.ops.aten._to_copy.default and given[0].dtype == torch.int64 and result.is_meta:
            self._ids[result.untyped_storage()._cdata] = given[0]
        return result

    def count(self, tensor):
        if tensor.device.type != self.kind:
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size = storage.nbytes()
        self._known[storage._cdata] = weakref.finalize(storage, self._freed, storage._cdata, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, key, size):
        del self._known[key]
        self._ids.pop(key, None)
        self.now -= size

    def hold(self, *modules):
        """Count what modules already have."""
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.count(tensor)


def _fused(query, key, value, *_, **__):
    return FusedAttention.apply(query, key, value)
