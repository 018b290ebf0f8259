"""The routed projection on a CPU: shape x implementation, judged before it is timed.

    make bench-projection            three layers, fp32, 1 to 64 tokens
    make bench-projection FULL=1     every layer, fp32 and bf16, 1 to 512 tokens

A group of the table is one layer, dtype and M, so that its ratios read off; those printed last come
from rounds that alternate with the bare linear, so that a busy machine disturbs both alike. Weights
are warm where they fit the cache. On a GPU a wall clock measures launches: there `make gpu` replays
graphs.
"""

import functools
import itertools

import pytest
import torch

from bench import machine, timing
from bench.layers import LAYERS, RANK
from bench.peers import linear, official, peft_hooks, problem
from mogu_kernels import eager, ops
from tests import oracle

TOKENS = (1, 8, 64, 512)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
JUDGED_ROWS = 64  # the truth is fp64: as many rows as it takes, not all
ROUNDS = 7  # that alternate with the bare linear
LIMIT = 4  # RMS error of the peers, as a multiple of plain PyTorch's given the fold


def ours(problem, folded):
    """The op, as a module on a CPU calls it."""
    operands = problem.projection.operands()
    del operands["x"]
    return lambda x: ops.mogu_linear(x, **operands)


def folded_eager(problem, folded):
    """The best plain PyTorch, called directly."""
    operands = problem.projection.operands()
    del operands["x"]
    return lambda x: eager.mogu_linear(x, **operands)[0]


# how it is built, whether it is given the fold, how it is judged
IMPLEMENTATIONS = {
    "bare linear": (linear.build, None, "base"),
    "official": (official.build, False, "peer"),
    "official + fold": (official.build, True, "peer"),
    "PEFT": (peft_hooks.build, False, "peer"),
    "PEFT + fold": (peft_hooks.build, True, "peer"),
    "folded eager": (folded_eager, True, "ours"),
    "ours": (ours, True, "ours"),
}
CASES = list(itertools.product(DTYPES, LAYERS, TOKENS, IMPLEMENTATIONS))


@functools.lru_cache(maxsize=1)
def make(dtype: str, layer: str, M: int) -> problem.Problem:
    """The operands that all implementations of a group share."""
    N, K = LAYERS[layer]
    return problem.make(M=M, N=N, K=K, rank=RANK, dtype=DTYPES[dtype])


@functools.cache
def described() -> dict:
    """Asked for once."""
    return machine.describe()


def judge(kind: str, p: oracle.Projection, y: torch.Tensor) -> float:
    """Assert that y is right on evenly spread rows; returns its RMS error over plain PyTorch's.

    Ours is held to the oracle's gates, the base to the oracle's bound with routing off, and peers,
    which round more often by their nature, to `LIMIT`. The truth of an unfolded router is its own
    exact fold.
    """
    rows = torch.linspace(0, len(p.x) - 1, min(len(p.x), JUDGED_ROWS)).long()
    off = torch.zeros(len(rows), dtype=torch.bool)
    routed = off if kind == "base" else None
    p = oracle.Projection(**p.operands() | {"x": p.x[rows], "routed": routed})
    y = y[rows]
    if kind == "ours":
        oracle.assert_matches(actual=y, projection=p)
    truth = oracle.truth(p)
    error = (y.double() - truth).square().mean().sqrt()
    plain = (oracle.plain_pytorch(p).double() - truth).square().mean().sqrt()
    if kind == "base":
        assert ((y.double() - truth).abs() <= oracle.bound(p)).all()
    assert error <= LIMIT * plain, f"RMS error is {error / plain:.3g}x plain PyTorch's"
    return float(error / plain)


def ratio_to_bare(case: problem.Problem, function) -> float:
    """Median over interleaved rounds."""
    x, bare = case.projection.x, linear.build(case, None)
    samplers = {
        "bare": timing.sampler(lambda: bare(x), 1),
        "this": timing.sampler(lambda: function(x), 1),
    }
    samples = timing.interleaved(samplers, ROUNDS)
    return timing.ratio(samples["this"], samples["bare"])


@pytest.mark.parametrize(
    ("dtype", "layer", "M", "implementation"),
    CASES,
    ids=[f"{d}-{layer}-m{M}-{name.replace(' ', '_')}" for d, layer, M, name in CASES],
)
@torch.no_grad()
def test_projection(benchmark, ratios, dtype, layer, M, implementation):
    """One cell of the table."""
    build, folded, kind = IMPLEMENTATIONS[implementation]
    case = make(dtype, layer, M)
    function, x = build(case, folded), case.projection.x
    error = judge(kind, case.projection, function(x))
    ratio = ratio_to_bare(case, function)
    N, K = LAYERS[layer]
    benchmark.group = f"{layer}, N {N}, K {K}, {dtype}, M {M}"
    ratios.setdefault(benchmark.group, {})[implementation] = ratio
    benchmark.name = implementation
    benchmark.extra_info |= described() | {
        "config": {"M": M, "N": N, "K": K, "experts": 2, "rank": RANK, "dtype": dtype},
        "implementation": implementation,
        "times_bare_linear": round(ratio, 3),
        "rms_error_over_plain_pytorch": round(error, 4),
    }
    benchmark(function, x)
