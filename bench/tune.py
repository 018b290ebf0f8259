"""`make tune`: measures tiles on this GPU and writes mogu_kernels/configs/DEVICE/DTYPE.json.

    python -m bench.tune                     bf16 and fp16, every real layer
    python -m bench.tune --layer mistral_7b.k_proj --dtype bf16

For every op, layer and bucket of M a short list of tiles is tried, the heuristic's first. What does
not compile or gives a wrong result is left out. Another config replaces the heuristic's only if it
is faster by more than noise. The table is written after every layer, so a stopped run keeps
what it has.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import tqdm

from bench import machine, timing
from bench.gpu import graphs, operands
from bench.layers import EXPERTS, LAYERS, RANK
from mogu_kernels import launch, ops, tuning
from mogu_kernels.tuning import M_BUCKETS, TileConfig

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
OPS = ("mogu_linear", "gated_mlp")
MLP_LAYERS = [name for name in LAYERS if name.endswith("gate_proj")]
ROUNDS, DISCARDED = 9, 2
GAIN = 0.02  # by how much a config must beat the heuristic's


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description="Measure tiles.")
    parser.add_argument("--layer", choices=LAYERS, action="append", help="only this layer")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="only this dtype")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"make tune {machine.NO_GPU}")
        return 1
    device = torch.cuda.get_device_name()
    jobs = [
        (dtype, op, layer)
        for dtype in options.dtype or DTYPES
        for op in OPS
        for layer in options.layer or LAYERS
        if op == "mogu_linear" or layer in MLP_LAYERS
    ]
    for dtype, op, layer in tqdm.tqdm(jobs, unit="layer"):
        table = {str(rows): str(fastest(op, layer, rows, dtype)) for rows in M_BUCKETS}
        path = tuning.table_path(device, dtype)
        merge(path, key(op, *LAYERS[layer], EXPERTS * RANK), table)
        tqdm.tqdm.write(f"{path}: {op} {layer}: {table}")
    return 0


def key(op: str, N: int, K: int, rank_columns: int) -> str:
    """As `tuning.tile_config` looks it up."""
    return f"{op}:{N}x{K}:r{rank_columns}"


def merge(path: Path, entry: str, table: dict[str, str]) -> None:
    """Set one entry of a table; the file is replaced at once or not at all."""
    whole = json.loads(path.read_text()) if path.exists() else {}
    whole[entry] = table
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(dict(sorted(whole.items())), file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def fastest(op: str, layer: str, rows: int, dtype: str) -> TileConfig:
    """The best tiles of a bucket, timed at its largest M."""
    N, K = LAYERS[layer]
    make = functools.partial(
        operands.make, M=rows, N=N, K=K, E=EXPERTS, rank=RANK, dtype=DTYPES[dtype], device="cuda"
    )
    pair = [make(seed=0), make(seed=1)] if op == "gated_mlp" else [make()]
    target = launch.target(pair[0].x.device)
    tried = candidates(op, rows, EXPERTS * RANK, dtype, target)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = list(zip(*(operands.rotated(p, cache) for p in pair), strict=True))
    replays = {}
    with graphs.on_stream() as stream:
        for tiles in tried:
            call = functools.partial(CALLS[op], tiles=tiles)
            if works(op, call, copies[0]):
                replays[tiles] = graphs.captured(call, copies, stream)
        samples = timing.interleaved(replays, ROUNDS, DISCARDED)
    return pick(tried[0], samples)


def pick(heuristic: TileConfig, samples: dict[TileConfig, list[float]]) -> TileConfig:
    """The fastest, or the heuristic's where the gain is within `GAIN`."""
    if not samples:
        return heuristic
    medians = {tiles: timing.spread(taken).median for tiles, taken in samples.items()}
    best = min(medians, key=medians.get)
    if heuristic in samples and timing.ratio(samples[best], samples[heuristic]) > 1 - GAIN:
        return heuristic
    return best


def works(op: str, call: Callable, operand) -> bool:
    """Whether the tiles compile, fit the GPU and give a right result."""
    try:
        y = call(operand)
        if op == "gated_mlp":
            operands.judge_mlp(list(operand), y)
        else:
            operands.judge(operand[0], y)
    except Exception as error:  # out of shared memory, no such layout, a wrong result
        tqdm.tqdm.write(f"left out {call.keywords['tiles']}: {type(error).__name__}")
        return False
    return True


def linear(operand, tiles: TileConfig):
    """One projection."""
    return ops.mogu_linear(**operand[0].operands(), backend="triton", config=tiles)


def mlp(operand, tiles: TileConfig):
    """gate_proj and up_proj of one x."""
    names = ("weight", "lora_A", "lora_B", "gate_weight", "gate_bias")
    return ops.gated_mlp(
        operand[0].x,
        bias=None,
        **{name: [getattr(p, name) for p in operand] for name in names},
        scaling=operand[0].scaling,
        backend="triton",
        config=tiles,
    )


CALLS = {"mogu_linear": linear, "gated_mlp": mlp}


def candidates(op: str, rows: int, rank_columns: int, dtype: str, target: str) -> list[TileConfig]:
    """What is tried for a bucket, the heuristic's choice first.

    Up to 128 tokens `mogu_linear` stays at one launch (budget 1). The flag form is never tried.
    """
    if op == "gated_mlp":
        first = tuning.mlp_heuristic(rows, rank_columns, dtype, target)
        tried = [TileConfig("two_launch", *block) for block in MLP_TILES[_size(rows)]]
    else:
        first = tuning.linear_heuristic(rows, rank_columns, dtype, target)
        kernel = "fused" if rows <= 128 else "two_launch"
        tried = [TileConfig(kernel, *block) for block in LINEAR_TILES[_size(rows)]]
    tried = [first, *tried]
    if target in ("hopper", "blackwell"):
        if op == "mogu_linear" and rows > 128:
            tried = [dataclasses.replace(tiles, descriptors=True) for tiles in tried]
        two = [tiles for tiles in tried if tiles.kernel == "two_launch"]
        tried += [dataclasses.replace(tiles, pdl=True) for tiles in two]
    return list(dict.fromkeys(tried))


def _size(rows: int) -> int:
    """The list that serves a bucket."""
    return next((size for size in LINEAR_TILES if rows <= size), max(LINEAR_TILES))


LINEAR_TILES = {  # BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, num_warps, num_stages
    16: (
        (16, 16, 256, 8, 4, 4),
        (16, 32, 128, 8, 4, 5),
        (16, 32, 256, 8, 4, 3),
        (16, 64, 128, 8, 4, 4),
        (16, 64, 256, 8, 8, 3),
        (16, 128, 128, 8, 8, 3),
    ),
    64: (
        (64, 32, 128, 8, 4, 3),
        (64, 64, 64, 8, 4, 5),
        (64, 64, 128, 8, 4, 3),
        (64, 128, 64, 8, 4, 4),
        (64, 128, 64, 8, 8, 4),
        (32, 64, 128, 8, 4, 4),
    ),
    128: (
        (64, 64, 64, 8, 4, 4),
        (64, 128, 64, 8, 4, 4),
        (128, 64, 64, 8, 4, 4),
        (128, 64, 128, 8, 8, 3),
        (128, 128, 64, 8, 8, 4),
        (128, 256, 64, 8, 8, 3),
    ),
    4096: (
        (64, 128, 64, 8, 4, 4),
        (64, 256, 64, 8, 8, 3),
        (128, 128, 64, 8, 4, 4),
        (128, 128, 64, 8, 8, 4),
        (128, 256, 64, 8, 8, 3),
        (128, 256, 64, 8, 8, 4),
        (256, 128, 64, 8, 8, 3),
    ),
}
MLP_TILES = {
    16: ((16, 32, 256, 8, 4, 3), (16, 64, 128, 8, 4, 3), (16, 16, 256, 8, 4, 4)),
    64: ((64, 32, 64, 8, 4, 4), (64, 64, 64, 8, 4, 4), (64, 64, 128, 8, 8, 3)),
    128: ((64, 64, 64, 8, 4, 4), (128, 64, 64, 8, 8, 4), (128, 128, 64, 8, 8, 3)),
    4096: ((128, 64, 64, 8, 4, 4), (128, 128, 64, 8, 8, 3), (128, 128, 64, 8, 8, 4)),
}


if __name__ == "__main__":
    sys.exit(main())
