"""What one call of one implementation costs: launches, unique bytes, FLOPs, modelled time.

Every call is counted twice, in two ways that must agree to the byte:
1. at its real size, data movement and arithmetic skipped, in blocks so large that no product is
   computed twice: unique bytes and useful FLOPs;
2. with the blocks that are shipped, at eight smaller sizes: unique bytes and the FLOPs that the
   tensor cores see are linear in the number of whole blocks of M, of N and of K, so the corners of
   a cube give the real size.
"""

import dataclasses
import itertools
import math
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined

import torch
import triton

from bench.peers import PEERS, problem
from bench.trace import Launch
from bench.traffic import Traffic
from tests import oracle

COPY_BANDWIDTH = 3.0e12  # bytes a second, measured on an H100
MATRIX_RATE = 798e12  # bf16 FLOP a second, measured on an H100
OURS, OPT_IN, FLOOR = "ours", "ours, one launch (opt-in)", "bare linear"
LARGEST_BLOCK = 2**20  # elements; Triton's own limit
STEPS = (128, 256, 128)  # of M, N, K; every shipped block divides its step


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one call: launches with shipped blocks, and the FLOPs that nobody can do without."""

    log: list[Launch]
    useful_flops: int

    launches = property(lambda self: len(self.log))
    bytes = property(lambda self: sum(_bytes(launch) for launch in self.log))
    flops = property(lambda self: sum(launch.flops for launch in self.log))
    seconds = property(
        lambda self: sum(
            max(_bytes(launch) / COPY_BANDWIDTH, launch.flops / MATRIX_RATE) for launch in self.log
        )
    )


def check_peers() -> None:
    """Every peer computes the routed projection, to fp32 rounding, or is not counted."""
    for tokens in (19, 4096):  # tiles for few and for many
        case = problem.make(M=19, N=72, K=56, rank=6, dtype=torch.float32, hidden=24, tokens=tokens)
        p = case.projection.double()
        truths = {True: oracle.truth(p), False: oracle.truth(p), None: p.x @ p.weight.T}
        for name, peer in PEERS.items():
            with torch.no_grad():
                y = peer.build(case, peer.folded)(case.projection.x)
            truth = truths[peer.folded]
            error = float((y.double() - truth).abs().max() / truth.abs().max())
            if not error < 1e-6:
                raise AssertionError(f"{name} is off by {error:.2g} of the largest element")


def count(name: str, M: int, N: int, K: int, rank: int) -> Cost:
    """Both counts of one call; they must agree on every launch's bytes (flags go by row block)."""
    flags = 4 * math.ceil(M / 128) if name == OPT_IN else 0
    whole = count_at(name, M, N, K, rank, blocks=large_blocks(M, N))
    log = extrapolate(name, M, N, K, rank)
    for large, shipped in zip(whole, log, strict=True):
        more_loaded = shipped.bytes_loaded - large.bytes_loaded
        more_stored = shipped.bytes_stored - large.bytes_stored
        if not 0 <= more_loaded == more_stored <= flags:
            raise AssertionError(f"two counts of {name}, {(M, N, K)}, disagree: {large}, {shipped}")
    return Cost(log, sum(launch.useful_flops for launch in whole))


def count_at(name, M, N, K, rank, *, blocks=None, tokens=None) -> list[Launch]:
    """The launches of one call at exactly this size, nothing computed."""
    peer = PEERS[name]
    with Traffic(skip=True) as traffic:
        case = problem.make(M=M, N=N, K=K, rank=rank, dtype=torch.float16, tokens=tokens)
        call = peer.build(case, peer.folded, blocks)
        traffic.log.clear()
        call(case.projection.x)
    return traffic.log


def extrapolate(name, M, N, K, rank) -> list[Launch]:
    """The launches of one call with shipped blocks, from the corners of a small cube."""
    axes = [_two_sizes(size, step) for size, step in zip((M, N, K), STEPS, strict=True)]
    result: list[Launch] = []
    for corner in itertools.product(*axes):
        sizes, weights = zip(*corner, strict=True)
        log = count_at(name, *sizes, rank, tokens=M)
        result = result or [Launch(name=launch.name) for launch in log]
        for total, launch in zip(result, log, strict=True):
            for field in ("bytes_loaded", "bytes_stored", "flops"):
                value = getattr(total, field) + math.prod(weights) * getattr(launch, field)
                setattr(total, field, value)
    return result


def _two_sizes(size: int, step: int) -> list[tuple[int, int]]:
    """(size, weight) of two small sizes with the rest of `size`; a linear f is their sum of w f."""
    near = size % step or step
    if near + step >= size:
        return [(size, 1)]
    steps = (size - near) // step
    return [(near, 1 - steps), (near + step, steps)]


def large_blocks(M: int, N: int) -> problem.Blocks:
    """As few programs as Triton's limit on a block allows, columns first."""
    rows = min(max(16, triton.next_power_of_2(M)), 1024)
    columns = min(triton.next_power_of_2(N), LARGEST_BLOCK // rows)
    return problem.Blocks(rows, columns, min(LARGEST_BLOCK // columns, 1024))


def _bytes(launch: Launch) -> int:
    return launch.bytes_loaded + launch.bytes_stored
