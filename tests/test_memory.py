"""In bounds, stored once, free of races, and the same bits whatever the order of the programs."""

import pytest
import torch

from mogu_kernels import ops
from tests import batteries, oracle, red_zones

all_ops = pytest.mark.parametrize("op", batteries.OPS)


@all_ops
def test_programs_in_any_order_give_the_same_bits_and_store_every_element_once(op):
    for shape, dtype in batteries.shapes_of(op):
        projections = batteries.problem(op, shape, dtype)
        expected, _ = batteries.run(op, projections)
        guarded = [red_zones.guarded(projection) for projection in projections]
        guarded[-1].x = guarded[0].x
        waited_for = batteries.producers(projections[0]) if op == "one_launch" else 0
        for order in range(3):
            with batteries.watched(op, order, waited_for) as trace:
                y, _ = batteries.run(op, guarded)
            assert torch.equal(y, expected), (shape, order)
            trace.assert_stored_once(y)


# tokens in one bucket, whose tiles `mogu_linear` chooses by itself
BUCKETS = {16: (1, 7, 16), 64: (17, 64), 128: (65, 128), 512: (129, 200)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_row_has_the_same_bits_alone_and_in_any_batch_of_its_bucket(bucket, dtype):
    whole = oracle.random(M=max(BUCKETS[bucket]), N=40, K=48, E=2, rank=8, dtype=dtype)
    generator = torch.Generator().manual_seed(bucket)
    row, seen = whole.x[0].clone(), []
    for M in BUCKETS[bucket]:
        for position in {0, M // 2, M - 1}:
            batch = oracle.Projection(**whole.operands())
            batch.x = whole.x[torch.randperm(len(whole.x), generator=generator)[:M]]
            batch.x[position] = row
            batch.routed = torch.rand(M, generator=generator) < 0.5
            batch.routed[position] = True
            seen.append(ops.mogu_linear(**batch.operands(), backend="triton")[position])
    assert all(torch.equal(y, seen[0]) for y in seen)
