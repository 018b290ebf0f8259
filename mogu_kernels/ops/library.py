"""What all ops have in common: the library, the choice of a backend, autocast."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mogu_kernels import checks, cpu
from mogu_kernels.tuning import TileConfig

_C: Any = torch._C  # its stubs know a part of it
LIBRARY = torch.library.Library("mogu", "DEF")


def define(schema: str, implementation: Callable, fake: Callable) -> None:
    """Register an op for the CPU and for CUDA and ROCm, and what it looks like to a compiler."""
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"mogu::{name}", fake, lib=LIBRARY)


def choose(backend: str, x: Tensor) -> str:
    """The backend that serves x: "eager", "cpu" or "triton"; a name was checked against x."""
    if backend != "auto":
        return backend
    if x.device.type != "cpu":
        return "triton" if x.dtype in checks.HALF_AND_SINGLE else "eager"
    return "cpu" if checks.runs_on_cpp(x) else "eager"


def is_direct(backend: str, x: Tensor) -> bool:
    """Whether the C++ backend may be called at once: nobody is watching what ops are called.

    That is most of decoding on a CPU, where checks and dispatch in Python take longer than the
    kernel. The backend declines what does not fit, so that the long way names the error.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and choose(backend, x) == "cpu"
        and bool(cpu.instruction_sets())
        and not torch.is_autocast_enabled("cpu")
        and not _C._len_torch_dispatch_stack()
        and not _C._len_torch_function_stack()
        and _C._functorch.peek_interpreter_stack() is None
        and _C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and not _C._autograd._profiler_enabled()
    )


def parse(config: str) -> TileConfig | None:
    """The inverse of `text`."""
    return TileConfig.parse(config) if config else None


def text(config: TileConfig | None) -> str:
    """A config as it travels through `torch.library`."""
    return "" if config is None else str(config)


def needs_grad(*operands: Any) -> bool:
    """Whether autograd is watching one of the tensors, alone or in lists."""
    if not torch.is_grad_enabled():
        return False
    return any(
        tensor.requires_grad
        for operand in operands
        for tensor in (operand if isinstance(operand, list | tuple) else (operand,))
        if isinstance(tensor, Tensor)
    )


def autocast(device: str, tensors: Iterable[Tensor | None]) -> list[Any]:
    """The operands in autocast's dtype where it is on; routers stay wide, so they are not here."""
    if not _autocasting(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in tensors
    ]


def outside_autocast(function: Callable, device: str, *operands: Any) -> Any:
    """Call `function` where autocast cannot narrow what it keeps wide."""
    if not _autocasting(device):
        return function(*operands)
    with torch.autocast(device, enabled=False):
        return function(*operands)


def _autocasting(device: str) -> bool:
    """Whether autocast is on; never for devices that do not know it, such as meta."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
