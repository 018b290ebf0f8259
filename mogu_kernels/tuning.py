"""Tile configurations: what a kernel is launched with, and how one is picked.

A choice depends on the *bucket* that M falls in, never on M itself: a token's result must not
depend on who shares its batch.
"""

import dataclasses
import functools
import re
from typing import Any, Literal

M_BUCKETS = (16, 64, 128, 512, 4096)
WIDEST_FUSED_RANK = 64  # rank columns of all experts that the one-launch kernel keeps in registers

_TEXT = re.compile(r"(fused|two_launch):(\d+)x(\d+)x(\d+):g(\d+):w(\d+):s(\d+)")


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Tiles of one `mogu_linear` call; every block is a power of two of at least 16.

    `str(config)` and `TileConfig.parse` are inverse: the text travels through `torch.library`, and
    names test cases and benchmark rows.
    """

    kernel: Literal["fused", "two_launch"]
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int = 8
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self):
        """Refuse what Triton cannot compile, with the value."""
        if self.kernel not in ("fused", "two_launch"):
            raise ValueError(f'kernel is "fused" or "two_launch", not {self.kernel!r}')
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
            block = getattr(self, name)
            if block < 16 or block & (block - 1):
                raise ValueError(f"{name}={block}: take a power of two of at least 16")
        for name in ("GROUP_M", "num_warps", "num_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: take at least 1")

    def __str__(self):
        """Such as `fused:64x64x64:g8:w4:s3`."""
        return (
            f"{self.kernel}:{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K}"
            f":g{self.GROUP_M}:w{self.num_warps}:s{self.num_stages}"
        )

    @staticmethod
    @functools.cache
    def parse(text: str) -> "TileConfig":
        """The config that prints as `text`."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"config {text!r} is not of the form fused:64x64x64:g8:w4:s3")
        kernel: Any = match[1]
        return TileConfig(kernel, *map(int, match.groups()[1:]))


@dataclasses.dataclass(frozen=True)
class ShrinkConfig:
    """Tiles of one `shrink_gate` launch."""

    BLOCK_M: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def bucket(M: int) -> int:
    """The smallest of `M_BUCKETS` that holds M, or the largest."""
    return next((size for size in M_BUCKETS if size >= M), M_BUCKETS[-1])


def tile_config(M: int, rank_columns: int, element_size: int) -> TileConfig:
    """Heuristic tiles for M tokens, `rank_columns` = E * rank and elements of 2 or 4 bytes."""
    rows = bucket(M)
    wide = rank_columns > WIDEST_FUSED_RANK
    if element_size > 2:  # fp32: no tensor cores at full precision, half the tile in shared memory
        return TileConfig("two_launch" if wide else "fused", 64 if rows > 16 else 16, 64, 32)
    if rows <= 16:
        return TileConfig("two_launch" if wide else "fused", 16, 64, 128, num_stages=4)
    if rows <= 64:
        return TileConfig("two_launch" if wide else "fused", 64, 64, 64, num_stages=4)
    if rows <= 128 and not wide:
        return TileConfig("fused", 128, 128, 64, num_warps=8)
    return TileConfig("two_launch", 128, 256, 64, num_warps=8)


def shrink_config(M: int) -> ShrinkConfig:
    """Heuristic tiles for the narrow GEMM: short row blocks, so that many programs read."""
    if bucket(M) <= 512:
        return ShrinkConfig(BLOCK_M=16, BLOCK_K=128, num_warps=4, num_stages=4)
    return ShrinkConfig(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=4)
