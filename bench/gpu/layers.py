"""One real layer at every M: each contender judged, captured, and timed in interleaved rounds."""

import torch
import tqdm

from bench import timing
from bench.gpu import contenders, graphs, operands
from bench.layers import EXPERTS, LAYERS, RANK, TOKENS

ROUNDS, DISCARDED = 15, 3


def measure(layer: str, one_launch: bool, tokens=TOKENS, device="cuda") -> dict:
    """{M: {contender: seconds, spread, ratio to cuBLAS, or what went wrong}}."""
    rows = {}
    for M in tqdm.tqdm(tokens, layer, leave=False):
        rows[str(M)] = at(layer, M, one_launch, device)
    return rows


def at(layer: str, M: int, one_launch: bool, device: str) -> dict:
    """One cell of the table."""
    N, K = LAYERS[layer]
    p = operands.make(M=M, N=N, K=K, E=EXPERTS, rank=RANK, dtype=torch.bfloat16, device=device)
    copies = operands.rotated(p, torch.cuda.get_device_properties(0).L2_cache_size)
    found = contenders.contenders(p, one_launch)
    replays, cell = {}, {}
    with graphs.on_stream() as stream:
        for name, contender in found.items():
            try:
                operands.judge(p, contender.call(p), contender.routed)
                replays[name] = graphs.captured(contender.call, copies, stream)
            except Exception as error:  # whatever it is, the others are still timed
                cell[name] = {"config": contender.config, "error": first_line(error)}
        samples = timing.interleaved(replays, ROUNDS, DISCARDED)
    base = samples.get(contenders.CUBLAS)
    for name, taken in samples.items():
        cell[name] = {
            "config": found[name].config,
            "seconds": vars(timing.spread(taken)),
            "over_cublas": timing.ratio(taken, base) if base else None,
        }
    return cell


def first_line(error: BaseException) -> str:
    """An error as a cell of a table can hold it."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
