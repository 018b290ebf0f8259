"""The CPU backend beside what else one would run on a CPU: cold weights, interleaved rounds.

    python -m bench.cpu [--quick]

Every contender owns enough copies of its weights that a round walks over more bytes than the last
cache holds. A cell is the median of the ratios to `F.linear` that the rounds gave; where
`F.linear` itself wavered too much, there is a dash instead of a verdict. The same again with twice
as many runnable threads as cores, for two of the contenders.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from bench import machine, timing
from bench.layers import EXPERTS, RANK
from bench.peers import official, peft_hooks, problem
from mogu_kernels import cpu, eager, ops

SIZES, TOKENS = (576, 1024, 2048, 4096), (1, 2, 4, 16, 128, 512)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CROWDED = [(size, tokens) for size in (576, 4096) for tokens in (1, 16, 128)]
COLD_BYTES = 160e6  # of weights that a round walks over
MOST_FROZEN = 40  # linears that are compiled in one go: more take minutes
NOISE = 1.25  # upper over lower quartile of F.linear beyond which there is no verdict
RESULT = Path("bench/results/cpu")
COLUMNS = ("compiled", "official", "PEFT", "folded eager", "ours", "ours / best", "ours / without")


def copies(size: int, tokens: int, dtype: torch.dtype) -> list[problem.Problem]:
    """Layers whose weights no cache holds together; lora_B lies as MoGULinear keeps it."""
    count = max(2, int(COLD_BYTES / (size * size * dtype.itemsize)) + 1)
    shape = {"M": tokens, "N": size, "K": size, "rank": RANK, "dtype": dtype}
    made = [problem.make(**shape, seed=seed) for seed in range(count)]
    for own in made:
        lora_B = own.projection.lora_B
        own.projection.lora_B = lora_B.transpose(0, 1).contiguous().transpose(0, 1)
    return made


def contenders(made: problem.Problem) -> dict[str, Callable]:
    """Functions of x by name; `without` is our GEMM with next to no MoGU in it."""
    p = made.projection
    operands = (p.weight, None, p.lora_A, p.lora_B, p.gate_weight, p.gate_bias)
    small = (
        p.weight,
        None,
        p.lora_A[:1, :1],
        p.lora_B[:1, :, :1],
        p.gate_weight[:1],
        p.gate_bias[:1],
    )
    rest = {"scaling": p.scaling, "gate": "sigmoid", "routed": None}
    return {
        "F.linear": lambda x: F.linear(x, p.weight),
        "official": official.build(made, False),
        "PEFT": peft_hooks.build(made, True),
        "folded eager": lambda x: eager.mogu_linear(x, *operands, **rest),
        "without": lambda x: ops.mogu_linear(x, *small, scaling=[2.0]),
        "ours": lambda x: ops.mogu_linear(x, *operands, scaling=p.scaling),
    }


class Linears(nn.Module):
    """The plain layers one after the other, for the compiler to freeze."""

    def __init__(self, made: list[problem.Problem]):
        super().__init__()
        self.weights = nn.ParameterList(own.projection.weight for own in made)

    def forward(self, x):
        """Outputs of all of them."""
        return [F.linear(x, weight) for weight in self.weights]


def walks(made: list[problem.Problem], x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """One pass over all copies by contender; compiled and frozen where that takes no minutes."""

    def walk(functions):
        for function in functions:
            function(x)

    by_name = [contenders(own) for own in made]
    passes = {name: functools.partial(walk, [own[name] for own in by_name]) for name in by_name[0]}
    if len(made) <= MOST_FROZEN:
        compiled = torch.compile(Linears(made), dynamic=False)
        with torch._inductor.config.patch(freezing=True):  # pyright: ignore
            compiled(x)
        passes["compiled"] = functools.partial(compiled, x)
    return passes


@torch.no_grad()
def measure(
    size: int, tokens: int, dtype: torch.dtype, rounds: int, only: tuple[str, ...] = ()
) -> dict[str, list[float]]:
    """Seconds of one call by contender (all, or `only` some), one figure a round."""
    made = copies(size, tokens, dtype)
    passes = walks(made, torch.randn(tokens, size).to(dtype))
    chosen = {name: passes[name] for name in only or passes}
    samplers = {name: timing.sampler(run, 1) for name, run in chosen.items()}
    samples = timing.interleaved(samplers, rounds)
    torch._dynamo.reset()
    return {name: [s / len(made) for s in own] for name, own in samples.items()}


def verdict(samples: dict[str, list[float]]) -> dict[str, float] | None:
    """Ratios to `F.linear`, to the best stock linear and to `without`; None if it was too noisy."""
    linear = samples["F.linear"]
    base = timing.spread(linear)
    if base.high > NOISE * base.low:
        return None
    best = [min(pair) for pair in zip(linear, samples.get("compiled", linear), strict=True)]
    ours = samples["ours"]
    return {name: timing.ratio(own, linear) for name, own in samples.items()} | {
        "ours / best": timing.ratio(ours, best),
        "ours / without": timing.ratio(ours, samples["without"]),
    }


@contextlib.contextmanager
def crowd() -> Iterator[None]:
    """As many busy processes as there are threads: twice as many runnable as cores."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_spin, daemon=True) for _ in range(torch.get_num_threads())]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.terminate()
            other.join()


def _spin():
    while True:
        pass


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
    rows = []
    for dtype, size, tokens in tqdm(cells, desc="projection"):
        samples = measure(size, tokens, DTYPES[dtype], options.rounds)
        row = {"dtype": dtype, "N = K": size, "M": tokens, **_spread(samples)}
        rows.append(row | {"ratios": verdict(samples)})
    header = ["dtype", "N = K", "M", *COLUMNS, "spread of ours"]
    lines = [[*_cells(row)] for row in rows]
    table = Table(*header, title="times F.linear, cold weights")
    for line in lines:
        table.add_row(*line)
    Console(width=140).print(table)
    if options.quick:
        return
    crowded = []
    for dtype, (size, tokens) in tqdm([(d, c) for d in DTYPES for c in CROWDED], desc="crowded"):
        with crowd():
            samples = measure(size, tokens, DTYPES[dtype], options.rounds, ("F.linear", "ours"))
        ratio = timing.ratio(samples["ours"], samples["F.linear"])
        crowded.append(
            {"dtype": dtype, "N = K": size, "M": tokens, **_spread(samples), "ratio": ratio}
        )
    text = [
        "# The routed projection on a CPU, times `F.linear`",
        "",
        f"E = {EXPERTS}, r = {RANK}, no bias, sigmoid gates. Cold weights, medians of the ratios "
        f"of {options.rounds} interleaved rounds, quartiles of ours; - where `F.linear` wavered by "
        f"more than {NOISE}x. `compiled`: torch.compile with freezing of the plain linears, where "
        f"at most {MOST_FROZEN} of them are needed. `ours / best`: the faster of the two stock "
        "linears in each round. `ours / without`: our GEMM with one expert of rank 1 instead. "
        f"{platform.machine()}, {', '.join(cpu.instruction_sets()[:1]) or 'not built'}, "
        f"{torch.get_num_threads()} threads, OMP_WAIT_POLICY="
        f"{os.environ.get('OMP_WAIT_POLICY', 'unset')}, torch {torch.__version__}, commit "
        f"{machine.commit()}. "
        "Written by `make bench-cpu`.",
        "",
        *_markdown(header, lines),
        "",
        "## With twice as many runnable threads as cores",
        "",
        "As many busy processes beside it as it has threads; both in the same crowd.",
        "",
        *_markdown(
            ["dtype", "N = K", "M", "ours / F.linear", "spread"],
            [
                [
                    *(str(row[name]) for name in ("dtype", "N = K", "M")),
                    f"{row['ratio']:.2f}",
                    f"{row['low']:.2f} to {row['high']:.2f}",
                ]
                for row in crowded
            ],
        ),
    ]
    RESULT.with_suffix(".md").write_text("\n".join(text) + "\n")
    RESULT.with_suffix(".json").write_text(
        json.dumps({"machine": machine.describe(), "rows": rows, "crowded": crowded})
    )


def _spread(samples) -> dict[str, float]:
    pairs = zip(samples["ours"], samples["F.linear"], strict=True)
    spread = timing.spread([ours / linear for ours, linear in pairs])
    return {"low": spread.low, "high": spread.high}


def _cells(row):
    yield from (row["dtype"], str(row["N = K"]), str(row["M"]))
    for column in COLUMNS:
        ratio = (row["ratios"] or {}).get(column)
        yield "-" if ratio is None else f"{ratio:.2f}"
    yield f"{row['low']:.2f} to {row['high']:.2f}"


def _markdown(header, lines):
    return [
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
        *("| " + " | ".join(line) + " |" for line in lines),
    ]


if __name__ == "__main__":
    main()
