"""Tile configurations: what a kernel is launched with, and how one is picked.

A choice depends on the *bucket* that M falls in, never on M itself: within a bucket a token's
result does not depend on who shares its batch. Measured tables (`configs/DEVICE/DTYPE.json`,
written by `make tune`) come first; where there is none, heuristic tiles and one warning. A CPU's
table (`configs/ISA/DTYPE.json`, `make tune-cpu`) says where its two forms cross.
"""

import dataclasses
import functools
import json
import re
import warnings
from pathlib import Path
from typing import Any, Literal

M_BUCKETS = (16, 64, 128, 512, 4096)
WIDEST_FUSED_RANK = 128  # rank columns of all experts that the one-launch kernel keeps in registers
MOST_TILED = 8  # tokens, where `most_tiled` finds no measured change-over
TARGETS = ("ampere", "hopper", "blackwell", "cdna")  # sm_80, sm_90, sm_100, gfx942 and their kin
TABLES = Path(__file__).parent / "configs"

Target = Literal["ampere", "hopper", "blackwell", "cdna"]
Dtype = Literal["f32", "f16", "bf16"]
# how matrices lie: fit for tensor descriptors; rows at multiples of 16 bytes; anything else
Layout = Literal["described", "aligned", "odd"]

_OPTIONS = ("descriptors", "pdl", "one_launch")
_TEXT = re.compile(r"(fused|two_launch):(\d+)x(\d+)x(\d+):g(\d+):w(\d+):s(\d+)((?::\w+)*)")


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Tiles of one call; every block is a power of two of at least 16.

    `str(config)` and `TileConfig.parse` are inverse: the text travels through `torch.library`,
    stands in the tables, and names test cases and benchmark rows.

    Attributes:
        kernel: "fused" (shrink, routers and expand in the GEMM's own loop) or "two_launch" (shrink
            first, expand in the GEMM's epilogue).
        BLOCK_M: rows of a tile; BLOCK_N its columns, BLOCK_K the step over in_features.
        GROUP_M: rows of tiles that are walked together.
        num_warps: of a program.
        num_stages: of the software pipeline.
        descriptors: persistent programs and tensor descriptors (sm_90 and later, "two_launch").
        pdl: the second launch starts while the first runs (programmatic dependent launch, sm_90
            and later, "two_launch").
        one_launch: the two launches as one, with flags between programs ("two_launch"). No GPU has
            proven it yet, hence never chosen by default.
    """

    kernel: Literal["fused", "two_launch"]
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int = 8
    num_warps: int = 4
    num_stages: int = 3
    descriptors: bool = False
    pdl: bool = False
    one_launch: bool = False

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
        chosen = [name for name in _OPTIONS if getattr(self, name)]
        if chosen and self.kernel == "fused":
            raise ValueError(f"{chosen[0]}=True goes with two_launch, not with fused")
        if self.one_launch and len(chosen) > 1:
            raise ValueError(f"one_launch=True does not go with {chosen[0]}=True")

    def __str__(self):
        """Such as `fused:64x64x64:g8:w4:s3`."""
        return (
            f"{self.kernel}:{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K}"
            f":g{self.GROUP_M}:w{self.num_warps}:s{self.num_stages}"
            + "".join(f":{name}" for name in _OPTIONS if getattr(self, name))
        )

    @staticmethod
    @functools.cache
    def parse(text: str) -> "TileConfig":
        """The config that prints as `text`."""
        match = _TEXT.fullmatch(text)
        options = match[8].split(":")[1:] if match else []
        if match is None or not set(options) <= set(_OPTIONS):
            raise ValueError(f"config {text!r} is not of the form fused:64x64x64:g8:w4:s3")
        numbers: Any = (match[1], *map(int, match.groups()[1:7]))
        return TileConfig(*numbers, **dict.fromkeys(options, True))


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


def tile_config(
    op: Literal["mogu_linear", "gated_mlp"],
    M: int,
    N: int,
    K: int,
    rank_columns: int,
    dtype: Dtype,
    target: Target,
    device: str | None = None,
    layout: Layout = "described",
) -> TileConfig:
    """Measured tiles for this device and shape if there are any, else heuristic ones.

    Args:
        op: what is launched.
        M: tokens; only their bucket counts.
        N: out_features.
        K: in_features.
        rank_columns: E * rank.
        dtype: of the operands.
        target: family of the device.
        device: its name, as the tables have it; None asks for the heuristic.
        layout: of the operands; the tables were measured on "described" ones.
    """
    rows = bucket(M)
    if device is not None and layout == "described":
        table = _table(device, dtype).get(f"{op}:{N}x{K}:r{rank_columns}", {})
        if table:
            nearest = min(table, key=lambda size: (abs(int(size) - rows), int(size)))
            return TileConfig.parse(table[nearest])
    heuristic = mlp_heuristic if op == "gated_mlp" else linear_heuristic
    return heuristic(rows, rank_columns, dtype, target, layout)


def linear_heuristic(
    rows: int, rank_columns: int, dtype: Dtype, target: Target, layout: Layout = "described"
) -> TileConfig:
    """Tiles of `mogu_linear` for a bucket of M; `make compile` holds each to its budget."""
    few = 2 if target == "cdna" else 3  # stages: LDS holds 64 KiB
    deep = 2 if target == "cdna" else 4
    narrow = rank_columns <= 64 if layout == "odd" else rank_columns <= WIDEST_FUSED_RANK
    kernel = "fused" if rows <= 128 and narrow else "two_launch"
    if dtype == "f32":  # no tensor cores at full precision, half the tile in shared memory
        kernel = "fused" if rows <= 128 and rank_columns <= 64 else "two_launch"
        block_m, num_warps = 64 if rows > 16 else 16, 8 if rank_columns > 64 else 4
        return TileConfig(kernel, block_m, 64, 32, num_warps=num_warps)
    if rows <= 16:
        block_k = 128 if layout != "odd" and rank_columns <= 64 else 64
        return TileConfig(kernel, 16, 32, block_k, num_stages=deep)
    if layout == "odd":  # loads of single elements: more registers for addresses
        num_warps = 4 if kernel == "two_launch" else 8
        block_n = 32 if rank_columns > 32 and kernel == "two_launch" else 64
        return TileConfig(kernel, 64, block_n, 32, num_warps=num_warps, num_stages=few)
    if rows <= 64:
        num_warps = 4 if rank_columns <= 64 else 8
        return TileConfig(kernel, 64, 64, 64, num_warps=num_warps, num_stages=deep)
    if rows <= 128:
        block_n, block_k = (128, 64) if rank_columns <= 32 else (64, 32)
        return TileConfig(kernel, 128, block_n, block_k, num_warps=8, num_stages=few)
    if target == "hopper" and layout == "described":
        return TileConfig(kernel, 128, 256, 64, num_warps=8, descriptors=True)
    # on Blackwell 128 x 256 would ask for 768 columns of tensor memory; there are 512
    descriptors = target == "blackwell" and layout == "described"
    return TileConfig(kernel, 128, 128, 64, num_warps=8, num_stages=few, descriptors=descriptors)


def mlp_heuristic(
    rows: int, rank_columns: int, dtype: Dtype, target: Target, layout: Layout = "described"
) -> TileConfig:
    """Tiles of `gated_mlp`, which holds two accumulators."""
    del rank_columns  # the epilogue takes them in chunks
    few = 2 if target == "cdna" else 3
    if dtype == "f32":
        return TileConfig("two_launch", 64 if rows > 16 else 16, 32, 32)
    if rows <= 16:
        return TileConfig("two_launch", 16, 32, 64 if layout == "odd" else 128, num_stages=few)
    if layout == "odd":
        return TileConfig("two_launch", 64, 64, 32, num_warps=8, num_stages=few)
    if rows <= 64:
        num_warps = 4 if target == "ampere" else 8
        block_k = 128 if target == "hopper" else 64
        return TileConfig("two_launch", 64, 64, block_k, num_warps=num_warps, num_stages=few)
    deep = 4 if target == "hopper" else few
    return TileConfig("two_launch", 128, 64, 64, num_warps=8, num_stages=deep)


def shrink_config(
    M: int, dtype: Dtype, target: Target, layout: Layout = "described"
) -> ShrinkConfig:
    """Heuristic tiles for the narrow GEMM: short row blocks, so that many programs read."""
    deep = 2 if target == "cdna" else 4
    if dtype == "f32" or layout == "odd":
        return ShrinkConfig(BLOCK_M=16, BLOCK_K=64, num_warps=4, num_stages=min(deep, 3))
    if bucket(M) <= 512:
        return ShrinkConfig(BLOCK_M=16, BLOCK_K=128, num_warps=4, num_stages=deep)
    return ShrinkConfig(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=deep)


def backward_config(
    M: int, dtype: Dtype, target: Target, layout: Layout = "described"
) -> TileConfig:
    """Heuristic tiles of the backward's GEMM, whose epilogue holds a tile of x beside its own."""
    rows, few = bucket(M), 2 if target == "cdna" else 3
    if dtype == "f32" or layout == "odd":
        return TileConfig("two_launch", 64 if rows > 16 else 16, 32, 32, num_stages=few)
    if rows <= 128:
        return TileConfig("two_launch", 64 if rows > 16 else 16, 64, 64, num_stages=few)
    return TileConfig("two_launch", 128, 128, 64, num_warps=8, num_stages=few)


@functools.cache
def _table(device: str, dtype: str) -> dict[str, dict[str, str]]:
    """{op and shape: {bucket: config}}; empty, with a warning, where nothing was measured."""
    path = table_path(device, dtype)
    if path.is_file():
        return json.loads(path.read_text())
    warnings.warn(
        f"no tiles were measured for {device} in {dtype}: heuristic ones are used "
        "(`make tune` measures them)",
        stacklevel=2,
    )
    return {}


@functools.cache
def most_tiled(isa: str, dtype: Dtype) -> int:
    """Tokens up to which the C++ backend reads the weight once; more go through its blocked GEMM.

    Args:
        isa: an instruction set of `cpu.instruction_sets()`, measured by `make tune-cpu` or not.
        dtype: of the operands.
    """
    path = table_path(isa, dtype)
    return json.loads(path.read_text())["most_tiled"] if path.is_file() else MOST_TILED


def table_path(device: str, dtype: str) -> Path:
    """Where the measured tiles of a device and dtype are kept."""
    return TABLES / re.sub(r"\W+", "_", device) / f"{dtype}.json"
