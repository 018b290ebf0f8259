"""The shapes that every implementation of the routed projection is tried on, by name."""

import pytest
import torch

from mogu_kernels import cpu
from mogu_kernels.tuning import TileConfig
from tests import oracle

FUSED = TileConfig("fused", 16, 64, 32)
FUSED_TALL = TileConfig("fused", 32, 32, 64, GROUP_M=1)
TWO_LAUNCH = TileConfig("two_launch", 16, 64, 32, GROUP_M=2)
PERSISTENT = TileConfig("two_launch", 16, 64, 32, GROUP_M=2, descriptors=True)
ONE_LAUNCH = TileConfig("two_launch", 16, 64, 32, GROUP_M=2, one_launch=True)
KERNELS = {
    "fused": FUSED,
    "fused_tall": FUSED_TALL,
    "two_launch": TWO_LAUNCH,
    "persistent": PERSISTENT,
    "one_launch": ONE_LAUNCH,
}
# the C++ backend as a parameter
CPP = pytest.param("cpu", marks=pytest.mark.skipif(not cpu.instruction_sets(), reason="not built"))
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

# M, N, K, E, rank, gate, bias, routed: sizes differ pairwise and are odd somewhere
SHAPES = {
    "m1-n65-k70-e2-r8": (1, 65, 70, 2, 8, "sigmoid", False, False),
    "m17-n136-k72-e2-r8-softmax": (17, 136, 72, 2, 8, "softmax", True, False),
    "m37-n72-k48-e1-r1-routed": (37, 72, 48, 1, 1, "sigmoid", True, True),
    "m33-n40-k129-e3-r5-routed": (33, 40, 129, 3, 5, "softmax", False, True),
    "m35-n67-k33-e8-r7": (35, 67, 33, 8, 7, "sigmoid", True, False),
    "m19-n72-k40-e8-r17": (19, 72, 40, 8, 17, "sigmoid", True, False),
}
TOO_WIDE = "m19-n72-k40-e8-r17"  # more rank columns than the fused kernel takes


def takes(kernel: str, shape: str) -> bool:
    """Whether a kernel is for a shape: descriptors ask for rows of a multiple of 16 bytes."""
    if kernel == "persistent":
        _, N, K, E, rank, *_ = SHAPES[shape]
        return all(size % 8 == 0 for size in (N, K, E * rank))
    return shape != TOO_WIDE or not kernel.startswith("fused")


PAIRS = [(s, k) for s in SHAPES for k in KERNELS if takes(k, s)]


def projection(shape: str, dtype: str, make=oracle.random, seed: int = 0) -> oracle.Projection:
    """The operands of a named shape in a named dtype."""
    M, N, K, E, rank, gate, bias, routed = SHAPES[shape]
    return make(
        M=M,
        N=N,
        K=K,
        E=E,
        rank=rank,
        dtype=DTYPES[dtype],
        gate=gate if make is oracle.random or E & (E - 1) == 0 else "sigmoid",
        bias=bias,
        routed=routed,
        seed=seed,
    )


def twin(projection: oracle.Projection, seed: int) -> oracle.Projection:
    """Another projection of the same shape that reads the same x, as up_proj beside gate_proj."""
    (M, K), N, (E, rank, _) = projection.x.shape, len(projection.weight), projection.lora_A.shape
    other = oracle.random(
        M=M,
        N=N,
        K=K,
        E=E,
        rank=rank,
        dtype=projection.x.dtype,
        bias=projection.bias is not None,
        seed=seed,
    )
    other.x, other.routed, other.gate = projection.x, projection.routed, projection.gate
    return other


def side_by_side(lora_B: torch.Tensor) -> torch.Tensor:
    """The same [E, N, r], lying in memory as [N, E * r]: what a descriptor asks for."""
    return lora_B.permute(1, 0, 2).contiguous().permute(1, 0, 2)
