"""What this very card reaches: copying, and multiplying bf16 matrices."""

import statistics
from collections.abc import Callable

import torch

COPIED = 2**30  # bytes, read once and written once
SIZE = 8192  # of a square product; random operands, since zeros run faster
ROUNDS = 20


def measure() -> dict:
    """Bytes a second (read and written) and FLOPs a second, medians."""
    source = torch.randint(256, (COPIED,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(SIZE, SIZE, device="cuda").bfloat16() for _ in range(2))
    return {
        "copy_bytes_per_second": 2 * COPIED / seconds(lambda: target.copy_(source)),
        "bf16_flops_per_second": 2 * SIZE**3 / seconds(lambda: a @ b),
    }


def seconds(function: Callable) -> float:
    """Median of single calls, each long enough to be timed alone, after a warm-up."""
    taken = []
    for turn in range(5 + ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        if turn >= 5:
            taken.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(taken)
