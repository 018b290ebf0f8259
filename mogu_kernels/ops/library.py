"""What all ops have in common: the library, the choice of a backend, autocast."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mogu_kernels import checks
from mogu_kernels.tuning import TileConfig

LIBRARY = torch.library.Library("mogu", "DEF")


def define(schema: str, implementation: Callable, fake: Callable) -> None:
    """Register an op for the CPU and for CUDA and ROCm, and what it looks like to a compiler."""
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"mogu::{name}", fake, lib=LIBRARY)


def choose(backend: str, x: Tensor, built: bool = True) -> str:
    """The backend that serves x: "eager", "cpu" or "triton"; a name was checked against x.

    `built`: whether the C++ backend has the op.
    """
    if backend != "auto":
        return backend if built or backend != "cpu" else "eager"
    if x.device.type != "cpu":
        return "triton" if x.dtype in checks.HALF_AND_SINGLE else "eager"
    return "cpu" if built and checks.runs_on_cpp(x) else "eager"


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
