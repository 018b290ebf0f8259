"""What every way of writing the routed projection costs, counted: bytes, FLOPs, launches, a model.

`make report` writes `bench/results/traffic.{md,json,png}` and fails when a budget is exceeded. It
needs no GPU, and its times are a model: of each launch, the longer of its bytes at the copy
bandwidth and its FLOPs at the matrix rate. What a launch itself costs is not in it.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib as mpl
from tqdm import tqdm

from bench.counting import (
    COPY_BANDWIDTH,
    FLOOR,
    MATRIX_RATE,
    OPT_IN,
    OURS,
    Cost,
    check_peers,
    count,
)
from bench.layers import LAYERS, RANK, TOKENS
from bench.peers import PEERS

BUDGET_LAYER = LAYERS["llama2_7b.o_proj"]
BUDGET_TOKENS, BUDGET_RANKS = (1, 16, 64, 128, 129, 512, 4096), (8, 16, 64)
RESULTS = Path("bench/results")
RATIO_TICKS, FLOP_TICKS = (1, 1.5, 2, 3, 5, 10), (1, 2, 5, 10, 30, 100)
STYLES = {
    "official": {"color": "tab:red", "linestyle": ":"},
    "official + fold": {"color": "tab:red"},
    "PEFT": {"color": "tab:orange", "linestyle": ":"},
    "PEFT + fold": {"color": "tab:orange"},
    "vLLM-style": {"color": "tab:blue", "linestyle": ":"},
    "vLLM-style + fold": {"color": "tab:blue"},
    "LoRAFusion-style": {"color": "tab:green", "linestyle": ":"},
    "LoRAFusion-style + fold": {"color": "tab:green"},
    OPT_IN: {"color": "black", "linestyle": "--"},
    OURS: {"color": "black", "linewidth": 2.5},
}


def main() -> None:
    """Check the peers, count, write, and judge the budgets."""
    parser = argparse.ArgumentParser(description="Count bytes, FLOPs and launches.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args().results
    check_peers()
    table = list(itertools.product(LAYERS, TOKENS, PEERS))
    gate = list(itertools.product(BUDGET_TOKENS, BUDGET_RANKS, (OURS, FLOOR)))
    calls = [(name, M, *LAYERS[layer], RANK) for layer, M, name in table]
    calls += [(name, M, *BUDGET_LAYER, rank) for M, rank, name in gate]
    distinct = list(dict.fromkeys(calls))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), mp_context=spawn) as pool:
        found = tqdm(pool.map(count, *zip(*distinct, strict=True)), "counting", len(distinct))
        by_call = dict(zip(distinct, found, strict=True))
    costs = {key: by_call[call] for key, call in zip(table, calls, strict=False)}
    gated = {key: by_call[call] for key, call in zip(gate, calls[len(table) :], strict=True)}
    verdicts = budgets(gated)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "traffic.md").write_text(markdown(costs, verdicts))
    (folder / "traffic.json").write_text(as_json(costs, verdicts))
    draw(costs, folder / "traffic.png")
    for verdict in verdicts:
        print(verdict)
    if not all(verdict.holds for verdict in verdicts):
        sys.exit(1)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One budget and what was counted."""

    budget: str
    value: float
    limit: float

    holds = property(lambda self: self.value <= self.limit)

    def __str__(self):
        """With the margin."""
        word = "holds" if self.holds else "FAILS"
        return f"{word}: {self.budget}: {self.value:.5g} of {self.limit:.5g}"


def budgets(costs: dict[tuple[int, int, str], Cost]) -> list[Verdict]:
    """The worst case of every budget over `costs[M, rank, name]`."""

    def worst(budget, limit, value, *, tokens, ranks=(RANK,)):
        found = [value(costs[M, r, OURS], costs[M, r, FLOOR]) for M in tokens for r in ranks]
        return Verdict(budget, max(found), limit)

    def bytes_(ours, bare):
        return ours.bytes / bare.bytes

    def useful(ours, bare):
        return ours.useful_flops / bare.useful_flops

    def matrix(ours, bare):
        return ours.flops / bare.flops

    def launches(ours, bare):
        return ours.launches

    few, many = [m for m in BUDGET_TOKENS if m <= 128], [m for m in BUDGET_TOKENS if m > 128]
    return [
        worst("launches, M <= 128, r 8 and 16", 1, launches, tokens=few, ranks=(8, 16)),
        worst("launches, M > 128, any r", 2, launches, tokens=many, ranks=BUDGET_RANKS),
        worst("unique bytes over bare linear, M <= 128, r = 8", 1.02, bytes_, tokens=few),
        worst("unique bytes over bare linear, M = 4096, r = 8", 1.35, bytes_, tokens=[4096]),
        worst("useful FLOPs over bare linear, any M, r = 8", 1.01, useful, tokens=BUDGET_TOKENS),
        worst(
            "useful FLOPs over bare linear, any M, r = 64",
            1.07, useful, tokens=BUDGET_TOKENS, ranks=[64],
        ),
        worst(
            "tensor-core FLOPs over bare linear, M = 512 and 4096, r 8 and 16",
            1.02, matrix, tokens=(512, 4096), ranks=(8, 16),
        ),
    ]  # fmt: skip


def markdown(costs, verdicts) -> str:
    """The budgets as a list, everything else as one table."""
    lines = [
        "# What the routed projection costs, counted",
        "",
        f"E = 2, r = {RANK}, bf16 (counted on fp16, which has the same size). Nothing here was "
        "measured on a GPU. Written by `make report`.",
        "",
        "- MB: distinct bytes of every launch, added up (10^6 bytes); reuse within a launch is "
        "taken to hit the cache.",
        "- GFLOP: what the tensor cores are given, padding and recomputation included. Matrix "
        "products of PyTorch count without padding: how a vendor library pads is not known.",
        f"- model us: a MODEL of an H100, not a measurement: for each launch the longer of bytes "
        f"/ {COPY_BANDWIDTH / 1e12:.1f} TB/s and FLOP / {MATRIX_RATE / 1e12:.0f} TFLOP/s (both "
        "constants were measured on such a card), added up. Launch overhead, which decides at "
        "small M, is left out: look at the launches.",
        "- x: times the bare linear of the same row.",
        '- "+ fold": given our exact fold of the published routers, which no other stack has. '
        "The others' matrix products with W are the bare linear's, except LoRAFusion-style and "
        "ours, which bring their own.",
        f'- "{OPT_IN}" differs from "{OURS}" above M = 128 only; no GPU has proven it.',
        "",
        "Budgets (N = K = 4096, worst case):",
        "",
        *[f"- {verdict}" for verdict in verdicts],
        "- for information: ranks over 32 (more than 64 rank columns) take two launches at any M.",
        "",
        "| layer | M | implementation | launches | MB | x | GFLOP | x | model us | x |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (layer, M, name), cost in costs.items():
        if name == OPT_IN and M <= 128:
            continue
        bare = costs[layer, M, FLOOR]
        cells = [layer, str(M), name, str(cost.launches)]
        for value, unit, base in (
            (cost.bytes, 1e6, bare.bytes),
            (cost.flops, 1e9, bare.flops),
            (cost.seconds, 1e-6, bare.seconds),
        ):
            cells += [f"{value / unit:,.4g}" if value < 1000 * unit else f"{value / unit:,.0f}"]
            cells += [f"{value / base:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def as_json(costs, verdicts) -> str:
    """Everything counted, by layer, M and implementation."""
    tree: dict = {}
    for (layer, M, name), cost in costs.items():
        tree.setdefault(layer, {}).setdefault(str(M), {})[name] = {
            "launches": cost.launches,
            "bytes": cost.bytes,
            "flops": cost.flops,
            "useful_flops": cost.useful_flops,
            "modelled_h100_seconds": cost.seconds,
        }
    found = {
        "model": {"bytes_per_second": COPY_BANDWIDTH, "flops_per_second": MATRIX_RATE},
        "budgets": [{**dataclasses.asdict(v), "holds": v.holds} for v in verdicts],
        "layers": tree,
    }
    return json.dumps(found, indent=1) + "\n"


def draw(costs, path: Path) -> None:
    """Three quantities over M for every layer, as multiples of the bare linear."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    quantities = {
        "unique bytes": lambda cost: cost.bytes,
        "tensor-core FLOPs": lambda cost: cost.flops,
        "modelled H100 time": lambda cost: cost.seconds,
    }
    figure, axes = plt.subplots(
        len(quantities), len(LAYERS), figsize=(17, 9), sharex=True, sharey="row"
    )
    for row, (label, value) in zip(axes, quantities.items(), strict=True):
        for axis, layer in zip(row, LAYERS, strict=True):
            for name, style in STYLES.items():
                tokens = TOKENS if name != OPT_IN else [m for m in TOKENS if m > 128]
                ratios = [
                    value(costs[layer, m, name]) / value(costs[layer, m, FLOOR]) for m in tokens
                ]
                axis.plot(tokens, ratios, marker=".", **style)
            axis.set(xscale="log", yscale="log", xticks=TOKENS)
            axis.set_xticklabels(TOKENS)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"{label}\n(bare linear = 1)")
        ticks = FLOP_TICKS if label == "tensor-core FLOPs" else RATIO_TICKS
        row[0].set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    for top, bottom, (layer, (N, K)) in zip(axes[0], axes[-1], LAYERS.items(), strict=True):
        top.set_title(f"{layer}\nN = {N}, K = {K}", fontsize=10)
        bottom.set_xlabel("M (tokens)")
    few, many = (
        {name: costs["llama2_7b.o_proj", m, name].launches for name in PEERS} for m in (64, 4096)
    )
    labels = [
        f"{name}: {few[name]} launch" + ("es" if few[name] > 1 else "")
        if few[name] == many[name] or name == OPT_IN
        else f"{name}: {few[name]} launch, {many[name]} above M = 128"
        for name in STYLES
    ]
    figure.legend(axes[0, 0].lines, labels, loc="lower center", ncols=5, frameon=False)
    figure.suptitle(
        f"Routed projection, counted without a GPU (E = 2, r = {RANK}, bf16). Time is a model: "
        f"{COPY_BANDWIDTH / 1e12:.1f} TB/s, {MATRIX_RATE / 1e12:.0f} TFLOP/s, no launch overhead."
        "\nFLOPs include padding and recomputation, except in PyTorch's products, whose padding "
        "is not known. Unfolded, official and PEFT coincide."
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
