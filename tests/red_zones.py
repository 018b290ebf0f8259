"""NaN around what a kernel reads and writes, so that a wrong address or a missing store shows."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mogu_kernels import launch
from tests.oracle import Projection

ZONE = 4096  # bytes on each side, more than a tile of the test configs can overshoot by


def poisoned(shape, dtype, device="cpu", zone=ZONE) -> Tensor:
    """An uninitialised tensor between red zones; every byte is 0xFF, a NaN in any float dtype."""
    size = math.prod(shape) * dtype.itemsize
    buffer = torch.full((size + 2 * zone,), 0xFF, dtype=torch.uint8, device=device)
    return buffer[zone : zone + size].view(dtype).view(shape)


def intact(tensor: Tensor) -> bool:
    """Whether nothing outside `tensor`, which `poisoned` made, was written."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    size = tensor.numel() * tensor.element_size()
    return bool((whole[:ZONE] == 0xFF).all() and (whole[ZONE + size :] == 0xFF).all())


@contextlib.contextmanager
def around_outputs() -> Iterator[None]:
    """Outputs and workspaces between red zones; afterwards nothing but them has been written."""
    made = []

    def empty(*shape, dtype, device):
        made.append(poisoned(shape, dtype, device))
        return made[-1]

    original, launch._empty = launch._empty, empty
    try:
        yield
    finally:
        launch._empty = original
    for tensor in made:
        assert intact(tensor), f"something was stored outside a {list(tensor.shape)} output"
        assert torch.isfinite(tensor).all(), f"a {list(tensor.shape)} output was not stored whole"


def guarded(projection: Projection) -> Projection:
    """The same operands, each between red zones."""

    def guard(tensor):
        copy = poisoned(tensor.shape, tensor.dtype, tensor.device)
        return copy.copy_(tensor)

    return _mapped(projection, guard)


def strided(projection: Projection) -> Projection:
    """The same values with other strides: axes reversed, NaN between the elements."""

    def spread(tensor):
        if tensor.dtype == torch.bool:
            return torch.stack([tensor, ~tensor], dim=-1)[..., 0]
        wide = torch.full((*reversed(tensor.shape), 2), float("nan"), dtype=tensor.dtype)
        view = wide[..., 1].permute(*reversed(range(tensor.ndim)))
        return view.copy_(tensor)

    return _mapped(projection, spread)


def _mapped(projection: Projection, change) -> Projection:
    return Projection(
        **{
            name: change(value) if isinstance(value, Tensor) else value
            for name, value in projection.operands().items()
        }
    )
