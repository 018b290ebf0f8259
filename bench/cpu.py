"""The CPU backend beside what else one would run on a CPU: cold weights, interleaved rounds.

    python -m bench.cpu [--quick]

Every contender owns enough copies of its weights that a round walks over more bytes than the last
cache holds. A cell is the median of the ratios to `F.linear` that the rounds gave; where
`F.linear` itself wavered too much, there is a dash instead of a verdict.
"""

import argparse
import functools
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from tqdm import tqdm

from bench import machine, timing
from bench.layers import EXPERTS, RANK
from bench.peers import official, peft_hooks, problem
from mogu_kernels import cpu, eager, ops

SIZES, TOKENS = (576, 1024, 2048, 4096), (1, 2, 4, 16, 128, 512)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLD_BYTES = 160e6  # of weights that a round walks over
NOISE = 1.25  # upper over lower quartile of F.linear beyond which there is no verdict
RESULT = Path("bench/results/cpu")


def contenders(made: problem.Problem) -> dict[str, Callable]:
    """Functions of x by name; `without` is our GEMM with next to no MoGU in it."""
    p = made.projection
    lora_B = p.lora_B.transpose(0, 1).contiguous().transpose(0, 1)
    operands = (p.weight, None, p.lora_A, lora_B, p.gate_weight, p.gate_bias)
    small = (
        p.weight,
        None,
        p.lora_A[:1, :1],
        lora_B[:1, :, :1],
        p.gate_weight[:1],
        p.gate_bias[:1],
    )
    rest = {"scaling": p.scaling, "gate": "sigmoid", "routed": None}
    return {
        "F.linear": lambda x: F.linear(x, p.weight),
        "official": official.build(made, False),
        "PEFT": peft_hooks.build(made, True),
        "folded eager": lambda x: eager.mogu_linear(x, *operands, **rest),
        "without": functools.partial(_call, small, rest | {"scaling": [2.0]}),
        "ours": lambda x: ops.mogu_linear(x, *operands, scaling=p.scaling),
    }


def _call(operands, rest, x):
    return cpu.mogu_linear(x, *operands, **rest, return_gates=False)


def measure(size: int, tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Seconds of one call by contender, one figure a round."""
    copies = max(2, int(COLD_BYTES / (size * size * dtype.itemsize)) + 1)
    shape = {"M": tokens, "N": size, "K": size, "rank": RANK, "dtype": dtype}
    sets = [contenders(problem.make(**shape, seed=seed)) for seed in range(copies)]
    x = torch.randn(tokens, size).to(dtype)

    def walk(name):
        for own in sets:
            own[name](x)

    samplers = {name: timing.sampler(functools.partial(walk, name), 1) for name in sets[0]}
    with torch.inference_mode():
        samples = timing.interleaved(samplers, rounds)
    return {name: [s / copies for s in own] for name, own in samples.items()}


def verdict(samples: dict[str, list[float]]) -> dict[str, float] | None:
    """Ratios to `F.linear`, and ours to `without`; None if the machine was too noisy."""
    base = timing.spread(samples["F.linear"])
    if base.high > NOISE * base.low:
        return None
    ratios = {name: timing.ratio(own, samples["F.linear"]) for name, own in samples.items()}
    return ratios | {"ours / without": timing.ratio(samples["ours"], samples["without"])}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the smallest size only; not written")
    options = parser.parse_args()
    cells = [
        (dtype, size, tokens)
        for dtype in DTYPES
        for size in (SIZES[:1] if options.quick else SIZES)
        for tokens in TOKENS
    ]
    columns = ("official", "PEFT", "folded eager", "ours", "ours / without")
    rows = []
    for dtype, size, tokens in tqdm(cells, desc="projection"):
        samples = measure(size, tokens, DTYPES[dtype], options.rounds)
        spread = timing.spread(
            [a / b for a, b in zip(samples["ours"], samples["F.linear"], strict=True)]
        )
        row = {"dtype": dtype, "N = K": size, "M": tokens, "low": spread.low, "high": spread.high}
        rows.append(row | {"ratios": verdict(samples)})
    header = ["dtype", "N = K", "M", *columns, "spread of ours"]
    lines = [[*_cells(row, columns)] for row in rows]
    table = Table(*header, title="times F.linear, cold weights")
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    if options.quick:
        return
    text = [
        "# The routed projection on a CPU, times `F.linear`",
        "",
        f"E = {EXPERTS}, r = {RANK}, no bias, sigmoid gates. Cold weights, medians of the ratios "
        f"of {options.rounds} interleaved rounds, quartiles of ours; - where `F.linear` wavered by "
        f"more than {NOISE}x. `ours / without`: our GEMM with one expert of rank 1 instead. "
        f"{platform.machine()}, {', '.join(cpu.instruction_sets()[:1]) or 'not built'}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, commit {machine.commit()}. "
        "Written by `make bench-cpu`.",
        "",
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
        *("| " + " | ".join(line) + " |" for line in lines),
    ]
    RESULT.with_suffix(".md").write_text("\n".join(text) + "\n")
    RESULT.with_suffix(".json").write_text(
        json.dumps({"machine": machine.describe(), "rows": rows})
    )


def _cells(row, columns):
    yield from (row["dtype"], str(row["N = K"]), str(row["M"]))
    for column in columns:
        yield "-" if row["ratios"] is None else f"{row['ratios'][column]:.2f}"
    yield f"{row['low']:.2f} to {row['high']:.2f}"


if __name__ == "__main__":
    main()
