"""A row's bits: the same alone, in any batch of its bucket, and under any mask on the others."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.gpu import contenders, operands
from bench.layers import EXPERTS, LAYERS, RANK
from mogu_kernels.tuning import M_BUCKETS
from tests.oracle import Projection

LAYERS_TRIED = ("llama2_7b.o_proj", "smollm2_135m.o_proj")
OPEN_END = 4500  # tokens that the last bucket is tried with, beyond its name
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def measure(layers=LAYERS_TRIED, buckets=M_BUCKETS, device="cuda") -> dict:
    """How many comparisons were made, and those that found other bits."""
    compared, different = 0, []
    for layer, bucket, dtype in itertools.product(layers, buckets, DTYPES):
        N, K = LAYERS[layer]
        M = most(bucket)
        p = operands.make(
            M=M, N=N, K=K, E=EXPERTS, rank=RANK, dtype=DTYPES[dtype], device=device, seed=M
        )
        for what, same in comparisons(p, least(bucket), shipped):
            compared += 1
            if not same:
                different.append(f"{layer}, {dtype}, M = {M}: {what}")
    return {"compared": compared, "different": different, "ok": not different}


def shipped(p: Projection) -> Tensor:
    """The op with the tiles that it picks."""
    return contenders.routed(p, None)


def comparisons(
    p: Projection, fewest: int, op: Callable[[Projection], Tensor]
) -> Iterator[tuple[str, bool]]:
    """(what is compared, whether the bits are equal); batches of `fewest` rows or more."""
    M, device = len(p.x), p.x.device
    generator = torch.Generator().manual_seed(0)
    whole = op(p)
    for rows in sorted({fewest, (fewest + M) // 2}):
        front = op(operands.changed(p, x=p.x[:rows].clone()))
        yield f"the first {rows} rows", torch.equal(front, whole[:rows])
        back = op(operands.changed(p, x=p.x[-rows:].clone()))
        yield f"the last {rows} rows", torch.equal(back, whole[-rows:])
    order = torch.randperm(M, generator=generator).to(device)
    permuted = op(operands.changed(p, x=p.x[order]))
    yield "permuted rows", torch.equal(permuted, whole[order])

    everyone = torch.ones(M, dtype=torch.bool, device=device)
    yield "a mask of all", torch.equal(op(operands.changed(p, routed=everyone)), whole)
    mask = (torch.rand(M, generator=generator) < 0.5).to(device)
    mask[0] = True
    masked = op(operands.changed(p, routed=mask))
    yield "routed rows under a mask", torch.equal(masked[mask], whole[mask])
    nobody = operands.changed(
        p,
        routed=torch.zeros_like(mask),
        lora_A=torch.zeros_like(p.lora_A),
        lora_B=torch.zeros_like(p.lora_B),
    )
    yield "unrouted rows, no adapters", torch.equal(masked[~mask], op(nobody)[~mask])


def least(bucket: int) -> int:
    """The smallest M of a bucket."""
    position = M_BUCKETS.index(bucket)
    return M_BUCKETS[position - 1] + 1 if position else 1


def most(bucket: int) -> int:
    """The largest M that a bucket is tried with; the last one has no end."""
    return OPEN_END if bucket == M_BUCKETS[-1] else bucket
