"""A layer's tensors on the GPU, and whether a result computed from them is right."""

import math

import torch
from torch import Tensor

from mogu_kernels.router import split_gate_weight
from tests import oracle

JUDGED_ROWS = 64  # the truth is fp64: as many rows as it takes, not all
CACHES = 3  # copies together take this many times the L2 cache
TENSORS = ("x", "weight", "lora_A", "lora_B", "gate_weight", "gate_bias")


def make(*, M, N, K, E, rank, dtype, device, seed=0) -> oracle.Projection:
    """Gaussian operands of unit scale, laid out as a module keeps them: experts side by side."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    gate_weight = normal(E, K) * K**-0.5
    half = dtype.itemsize == 2
    return oracle.Projection(
        x=normal(M, K).to(dtype),
        weight=(normal(N, K) * K**-0.5).to(dtype),
        bias=None,
        lora_A=(normal(E, rank, K) * K**-0.5).to(dtype),
        lora_B=(normal(N, E, rank) * rank**-0.5).to(dtype).permute(1, 0, 2),
        gate_weight=split_gate_weight(gate_weight, dtype) if half else gate_weight,
        gate_bias=normal(E),
        scaling=[2.0] * E,
    )


def rotated(p: oracle.Projection, cache_bytes: int) -> list[oracle.Projection]:
    """`p` and copies of it, together more than the cache holds."""
    count = copies_needed(bytes_of(p), cache_bytes)
    return [p, *(copied(p) for _ in range(count - 1))]


def copies_needed(bytes_each: int, cache_bytes: int) -> int:
    """At least two, so that no call finds its own operands in the cache."""
    return max(2, math.ceil(CACHES * cache_bytes / bytes_each))


def copied(p: oracle.Projection) -> oracle.Projection:
    """The same values and strides elsewhere in memory."""
    return changed(p, **{name: getattr(p, name).clone() for name in TENSORS})


def changed(p: oracle.Projection, **operands) -> oracle.Projection:
    """A copy with some operands replaced."""
    return oracle.Projection(**p.operands() | operands)


def bytes_of(p: oracle.Projection) -> int:
    """What one call has to read."""
    return sum(t.numel() * t.element_size() for t in (getattr(p, name) for name in TENSORS))


def bare_work(M: int, N: int, K: int, itemsize: int) -> tuple[int, int]:
    """Bytes and FLOPs that nobody can do without: x and weight read, y written, one product."""
    return (M * K + N * K + M * N) * itemsize, 2 * M * N * K


def judge(p: oracle.Projection, y: Tensor, routed: bool = True) -> None:
    """Assert that y [M, N] is right on evenly spread rows.

    With `routed` the oracle's gates hold; without, y is a plain projection, within the oracle's
    bound (its RMS gate compares with the very library that may have computed y).
    """
    assert list(y.shape) == [len(p.x), len(p.weight)], f"y is {list(y.shape)}"
    rows = judged_rows(y)
    if routed:
        part = changed(p, x=p.x[rows], routed=None if p.routed is None else p.routed[rows])
        oracle.assert_matches(actual=y[rows], projection=part)
        return
    part = changed(p, x=p.x[rows], routed=torch.zeros_like(rows, dtype=torch.bool))
    error = (y[rows].double() - oracle.truth(part)).abs()
    assert (error <= oracle.bound(part)).all(), "the plain projection is off by more than rounding"


def judge_mlp(pair: list[oracle.Projection], y: Tensor) -> None:
    """The same for silu(gate_proj) * up_proj of the first one's x."""
    rows = judged_rows(y)
    x = pair[0].x[rows]
    gate_proj, up_proj = (changed(p, x=x) for p in pair)
    oracle.assert_mlp_matches(
        actual=y[rows], gate_proj=gate_proj, up_proj=up_proj, activation="silu"
    )


def judged_rows(y: Tensor) -> Tensor:
    """Indices of the rows that are compared with the truth, the first and the last among them."""
    M = len(y)
    return torch.linspace(0, M - 1, min(M, JUDGED_ROWS), device=y.device).round().long()
