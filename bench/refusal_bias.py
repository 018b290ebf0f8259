"""How MoGU v2 trades refused attacks for refused harmless questions, as its `refusal_bias` moves.

    python -m bench.refusal_bias --artefacts DIR --seeds 0 1 2

`DIR/seed-S/mogu_v2` is what `bench.artefacts` left. A bias needs no training: the recipe's is
taken out of the checkpoint and another put in its place. The prompts are those of StrongREJECT and
of the edgy set that `bench.comparison` leaves out of its table, so that a bias chosen here is not
chosen on what the table shows, and harmless role-plays of ours (`sets.roles`). Written to
`bench/results/refusal-bias.{md,json,png}`.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from bench import machine
from bench.artefacts import depends_on, is_current, write
from bench.comparison import RESULTS, SHOWN
from demo.smollm2 import NAME, load_smollm2
from demo.train import RECIPE
from mogu_kernels import plots
from mogu_kernels.evaluation import evaluate, load_system, sets
from mogu_kernels.evaluation.measure import spread
from mogu_kernels.evaluation.report import security, usability
from mogu_kernels.evaluation.systems import RoutedSystem
from mogu_kernels.state import routed_modules
from mogu_kernels.training import load_config
from mogu_kernels.training.data import Example

SETS = ("strongreject", "edgy")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--artefacts", type=Path, default=Path("out/comparison"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--biases", type=float, nargs="+", default=[-0.25, 0.0, 0.25, 0.5])
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_float32_matmul_precision("medium")  # oneDNN's GEMMs: faster on some CPUs
    test, prefixes = sets.split().test, sets.refusal_prefixes()
    prompts = {name: left_out(test[name]) for name in SETS} | {"roles": sets.roles()[1]}
    trained_with = load_config(RECIPE).router.refusal_bias
    found: dict[float, list[dict[str, Any]]] = {bias: [] for bias in asked.biases}
    for seed in tqdm(asked.seeds, "seeds"):
        folder = asked.artefacts / f"seed-{seed}" / "mogu_v2"
        if not is_current(folder, depends_on("mogu_v2")):
            parser.error(f"{folder} is missing: python -m bench.artefacts --names mogu_v2")
        system, now = load_system(*load_smollm2(), folder), trained_with
        for bias in tqdm(asked.biases, "biases", leave=False):
            lean(system, bias - now)
            now = bias
            found[bias].append({"sets": evaluate(system, prompts, prefixes=prefixes)["sets"]})
    page = table(found, asked.seeds)
    write(asked.out / "refusal-bias.json", {"seeds": asked.seeds, "by_bias": found})
    (asked.out / "refusal-bias.md").write_text(page)
    points = {
        f"bias {bias:g}": [(usability(own), security(own)) for own in results]
        for bias, results in found.items()
    }
    plots.plot_frontier(points, path=asked.out / "refusal-bias.png")
    Console().print(page, markup=False)


def left_out(examples: Sequence[Example]) -> list[Example]:
    """Those of a set that the comparison's table does not show."""
    shown = {id(example) for example in spread(examples, SHOWN)}
    return [example for example in examples if id(example) not in shown]


@torch.no_grad()
def lean(system: RoutedSystem, bias: float) -> None:
    """Add `bias` to every unwilling gate's logit and take it from the glad one's, in place."""
    steps = torch.tensor([{"unwill": bias, "glad": -bias}[name] for name in system.expert_names])
    for module in routed_modules(system.model).values():
        module.gate_bias += steps.to(module.gate_bias)


def table(found: Mapping[float, Sequence[Mapping[str, Any]]], seeds: Sequence[int]) -> str:
    """The counts of every seed, and the rate over all of them."""
    counts = {name: own["n"] for name, own in next(iter(found.values()))[0]["sets"].items()}
    head = [
        f"{name} refused of {n}: seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} | %"
        for name, n in counts.items()
    ]
    lines = [
        f"# The refusal bias of MoGU v2 on {NAME}",
        "",
        "Prompts that the comparison's table does not show; answers of 32 tokens, greedy; fp32. "
        f"The recipe's bias is {load_config(RECIPE).router.refusal_bias:g}. "
        f"Commit {machine.commit()}. Written by `python -m bench.refusal_bias`.",
        "",
        f"| bias | {' | '.join(head)} |",
        f"| --- | {' | '.join(['---'] * 2 * len(head))} |",
    ]
    for bias, results in found.items():
        cells = []
        for name, n in counts.items():
            refused = [own["sets"][name]["refused"] for own in results]
            rate = 100 * sum(refused) / (n * len(refused))
            cells += [", ".join(map(str, refused)), f"{rate:.1f}"]
        lines.append(f"| {bias:g} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![frontier](refusal-bias.png)", ""])


if __name__ == "__main__":
    main()
