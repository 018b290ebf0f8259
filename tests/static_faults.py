"""What the static gate says of kernels with a fault put in, as JSON: `test_static.py` runs it.

A process of its own, since Triton's interpreter, in which the tests run, compiles nothing.
"""

import dataclasses
import json
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from bench.static import checks
from bench.static.cases import Case
from bench.static.measure import measure
from mogu_kernels import launch


@triton.jit
def empty_kernel(y_ptr, BLOCK_M: tl.constexpr):
    """Does nothing, as what a compiler has emptied."""


@triton.jit
def atomic_kernel(y_ptr, BLOCK_M: tl.constexpr):
    """Adds one to every element of y."""
    tl.atomic_add(y_ptr + tl.arange(0, BLOCK_M), 1)


@triton.jit
def refused_kernel(y_ptr, BLOCK_M: tl.constexpr):
    """Does not compile."""
    tl.static_assert(BLOCK_M > 1024)


@dataclasses.dataclass
class Fault:
    """Stands for a `Case`: one call of a faulty op."""

    call: Callable[[], None]
    most_launches: int = 1


def run(kernel, dtype=torch.float32, times: int = 1) -> Fault:
    """An op that launches `kernel` that often."""

    def call():
        for _ in range(times):
            launch._run(kernel, (1,), y_ptr=torch.empty(256, dtype=dtype), BLOCK_M=256)

    return Fault(call)


FAULTS = {
    "sound": ("sm_90", Case(16, config="fused:16x32x128:g8:w4:s2")),
    "spilling_tile": ("sm_80", Case(512, config="two_launch:128x256x32:g8:w4:s2")),
    "no_wgmma": ("sm_90", Case(64, config="fused:64x64x64:g8:w2:s2")),
    "does_not_fit": ("sm_90", Case(64, config="fused:64x64x64:g8:w4:s16")),
    "empty_kernel": ("sm_90", run(empty_kernel)),
    "float_atomic": ("sm_90", run(atomic_kernel)),
    "float_atomic_amd": ("gfx942", run(atomic_kernel)),
    "integer_atomic": ("sm_80", run(atomic_kernel, torch.int32)),
    "three_launches": ("sm_90", run(atomic_kernel, times=3)),
    "does_not_compile": ("sm_90", run(refused_kernel)),
}


def main() -> None:
    """Print {fault: problems}."""
    verdicts = {
        fault: [problem for row in measure(case, target) for problem in row.problems]
        for fault, (target, case) in FAULTS.items()
    }
    verdicts["kernel_without_case"] = checks.uncovered(["fused"])
    json.dump(verdicts, sys.stdout)


if __name__ == "__main__":
    main()
