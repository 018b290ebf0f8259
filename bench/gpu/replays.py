"""1e5 graph replays of the one-launch form: it waits for flags, and no proof covers a GPU.

Every replay must write the same bits as the first, leave its flags down, and agree with the form of
two launches. If it hangs, the watchdog ends the process, and its last line says where.
"""

import torch

from bench.gpu import contenders, graphs, operands
from bench.layers import EXPERTS, LAYERS, RANK
from mogu_kernels import launch
from mogu_kernels.tuning import TileConfig

REPLAYS, CHUNK = 100_000, 1_000
LAYER, TOKENS = "llama2_7b.o_proj", (1, 512, 4096)


def measure(replays: int = REPLAYS, tokens=TOKENS) -> dict:
    """{M: replays done and whether all agreed}."""
    found = {str(M): at(M, replays) for M in tokens}
    return {"tokens": found, "ok": all(row["ok"] for row in found.values())}


def at(M: int, replays: int) -> dict:
    """One M, in chunks of replays with a poisoned output before each."""
    N, K = LAYERS[LAYER]
    p = operands.make(M=M, N=N, K=K, E=EXPERTS, rank=RANK, dtype=torch.bfloat16, device="cuda")
    shipped = launch.choose_tiles("mogu_linear", p.x, N, EXPERTS * RANK)
    tiles = contenders.as_one_launch(shipped)
    different = 0
    with graphs.on_stream() as stream:
        graph, y = graphs.single(lambda p: contenders.routed(p, tiles), p, stream)
        graph.replay()
        first = y.clone()
        for done in range(0, replays, CHUNK):
            y.fill_(float("nan"))
            for _ in range(min(CHUNK, replays - done)):
                graph.replay()
            different += not torch.equal(y, first)  # waits
            print(f"M = {M}: {done + CHUNK} replays", flush=True)
        flags_up = sum(int(flags.count_nonzero()) for flags in launch._FLAGS.values())
        other = contenders.routed(p, two_launches(tiles))
    return {"config": str(tiles), "replays": replays} | verdict(
        p, first, other, different, flags_up
    )


def two_launches(tiles: TileConfig) -> TileConfig:
    """The same tiles without flags."""
    return TileConfig(
        "two_launch", tiles.BLOCK_M, tiles.BLOCK_N, tiles.BLOCK_K,
        tiles.GROUP_M, tiles.num_warps, tiles.num_stages,
    )  # fmt: skip


def verdict(p, y: torch.Tensor, other: torch.Tensor, different: int, flags_up: int) -> dict:
    """What was found; `ok` if the two forms are right and every chunk had the first one's bits."""
    operands.judge(p, y)
    operands.judge(p, other)
    apart = (y.double() - other.double()).abs().max() / other.abs().max()
    return {
        "chunks_with_other_bits": different,
        "flags_left_up": flags_up,
        "same_bits_as_two_launches": torch.equal(y, other),
        "largest_difference_over_largest_element": float(apart),
        "ok": not different and not flags_up,
    }
