"""Counts launches, unique bytes and multiply-adds of PyTorch calls and Triton kernels alike.

    with Traffic(skip=True) as traffic:
        y = peer(x)
    traffic.log, traffic.launches, traffic.bytes, traffic.flops

A PyTorch operation that computes is one launch, as in eager mode on a GPU: it reads the distinct
elements of its tensors (an expanded axis once), writes its results, and a matrix product multiplies
exactly what its sizes say, since how a vendor library pads is not known. Views and allocations cost
nothing. Triton kernels are counted by `Trace`, in Triton's interpreter.

`skip=True` computes nothing: tensors are allocated and never touched, so that real layer sizes are
cheap. Half precision is then fp16, which has bf16's size and the interpreter can hold.
"""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.trace import Launch, Trace

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_")  # never read what they replace
INTEGERS = (torch.int32, torch.int64, torch.bool)
NO_KERNEL = ("detach_", "lift_fresh", "promote_types", "_local_scalar_dense", "_unsafe_view")


class Traffic:
    """See the module; sums are taken over `log`, one `Launch` each, in order."""

    def __init__(self, skip: bool = False):
        self._trace = Trace(count_only=skip)
        self.log = self._trace.log
        self._watchers = (torch.no_grad(), self._trace, _Calls(self.log, skip))

    launches = property(lambda self: len(self.log))
    bytes = property(lambda self: sum(x.bytes_loaded + x.bytes_stored for x in self.log))
    flops = property(lambda self: sum(launch.flops for launch in self.log))
    useful_flops = property(lambda self: sum(launch.useful_flops for launch in self.log))

    def __enter__(self):
        """Watch PyTorch and the interpreter, without gradients."""
        for watcher in self._watchers:
            watcher.__enter__()
        return self

    def __exit__(self, *error):
        """Stop watching."""
        for watcher in reversed(self._watchers):
            watcher.__exit__(*error)


class _Calls(TorchDispatchMode):
    """Adds every PyTorch operation that computes to a log."""

    def __init__(self, log: list[Launch], skip: bool):
        super().__init__()
        self.log, self.skip = log, skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count one operation; what is made of others is taken apart first."""
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if func.namespace == "mogu":  # our op: look inside
            cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            with self:
                return func.redispatch(cpu, *args, **kwargs)
        if func.is_view or name in NO_KERNEL:
            return func(*args, **kwargs)
        counters = kwargs.get("dtype") in INTEGERS  # a kernel may wait on them: never garbage
        skip = self.skip and not counters
        result = _allocate(func, args, kwargs) if skip else func(*args, **kwargs)
        if name not in ALLOCATIONS:
            self.log.append(_launch(name, args, kwargs, result))
        return result


def _launch(name, args, kwargs, result) -> Launch:
    """What one PyTorch operation moves and multiplies."""
    read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    written = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
    if name in OVERWRITES:
        read = [tensor for tensor in read if tensor is not args[0]]
    flops = 0
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        left, right = read[-2:]
        flops = 2 * left.numel() * right.shape[-1]
    return Launch(
        name=name,
        bytes_loaded=_unique_bytes(read),
        bytes_stored=_unique_bytes(written),
        flops=flops,
        useful_flops=flops,
    )


def _unique_bytes(tensors) -> int:
    """Distinct bytes of the elements; two tensors of one allocation share all of them or none."""
    distinct = {}
    for t in tensors:
        axes = sorted((step, n) for step, n in zip(t.stride(), t.shape, strict=True) if step)
        elements = math.prod(n for _, n in axes) if t.numel() else 0
        place = (t.untyped_storage().data_ptr(), t.storage_offset(), *axes)
        distinct[place] = elements * t.element_size()
    return sum(distinct.values())


def _allocate(func, args, kwargs):
    """The operation's results, uninitialised; of an operation in place, the tensor it changes."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return value
    kwargs = {k: torch.device("meta") if k == "device" else v for k, v in kwargs.items()}
    shapes = func(
        *tree_map_only(torch.Tensor, _shape_only, args),
        **tree_map_only(torch.Tensor, _shape_only, kwargs),
    )
    return tree_map_only(
        torch.Tensor,
        lambda t: torch.empty_strided(t.size(), t.stride(), dtype=t.dtype),
        shapes,
    )


def _shape_only(tensor):
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
