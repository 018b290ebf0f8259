"""Compiles exactly what an op call would launch, on a target that is not here.

    with captured("sm_90") as launches:
        launch.mogu_linear(...)  # CPU tensors; their storage is never touched
    launches[0].compiled.asm["ptx"]

`launch._run` is the only place that launches. Here it asks `kernel.warmup` for the binary, with the
very arguments, so that pointer alignment, divisible strides and the options are the real ones.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from mogu_kernels import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FAMILIES = {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna"}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch that an op call made: the binary, or why there is none."""

    kernel: Any
    arguments: dict[str, Any]
    compiled: Any = None
    error: str = ""

    @property
    def name(self) -> str:
        """The kernel's, without its suffix."""
        return self.kernel.__name__.removesuffix("_kernel")


class _Driver:
    """What Triton asks of a driver before it loads a binary, which never happens here."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # Triton's caches are per device: another target is another device

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_launch(kernel, grid, **arguments) -> Launch:
    """What `kernel[grid](**arguments)` would load, for the target that is active."""
    try:
        return Launch(kernel, arguments, kernel.warmup(grid=grid, **arguments))
    except (triton.TritonError, RuntimeError, AssertionError, ValueError) as error:
        text = " ".join(str(error).split())  # the reason comes last
        return Launch(kernel, arguments, error=f"{type(error).__name__}: {text[-200:]}")


@contextlib.contextmanager
def captured(target: str) -> Iterator[list[Launch]]:
    """The launches of the op calls in this context, compiled for `target`."""
    launches: list[Launch] = []

    def run(kernel, grid, **arguments):
        launches.append(compile_launch(kernel, grid, **arguments))

    activate(target)
    family = mock.patch.object(launch, "target", return_value=FAMILIES[target])
    with family, mock.patch.object(launch, "_run", run):
        yield launches


def activate(target: str) -> None:
    """Make Triton believe that this GPU is the current one."""
    driver.set_active(_Driver(TARGETS[target]))
