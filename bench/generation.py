"""Whole generation on the real model: base, published and ours, in one interleaved run.

`make bench` writes `bench/results/generation.md`: times are this machine's, ratios the result.
"""

import argparse
import platform
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from demo import systems
from demo.memory import peak_megabytes

NEW_TOKENS = 64
PROMPTS = (128, 1024)
RESULT = Path("bench/results/generation.md")


def measure(rounds: int) -> dict[int, dict[str, list[float]]]:
    """Seconds by prompt length and system, A B C A B C ..., after one warm-up round."""
    built = {name: systems.build(name, stop=False) for name in systems.NAMES}
    generator = torch.Generator().manual_seed(0)
    seconds = {length: {name: [] for name in built} for length in PROMPTS}
    with tqdm(total=len(PROMPTS) * (rounds + 1) * len(built), desc="generation") as bar:
        for length in PROMPTS:
            ids = torch.randint(1000, 40000, (1, length), generator=generator)
            for turn in range(rounds + 1):
                for name, system in built.items():
                    taken, _ = system.timed(ids, NEW_TOKENS)
                    if turn:
                        seconds[length][name].append(taken)
                    bar.update()
    return seconds


def report(seconds, memory) -> str:
    """Markdown: medians with their spread, and the ratios that the project promises."""
    lines = [
        "# Whole generation, SmolLM2-135M-Instruct (dequantised from Q4_1), o_proj routed",
        "",
        f"{NEW_TOKENS} new tokens, greedy, fp32, batch 1, {torch.get_num_threads()} threads, "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}. Medians (min to "
        "max) of interleaved rounds in seconds; compare ratios, not times.",
        "",
        "| prompt | base | published | ours | ours / base | published / ours | "
        "added by ours / added by published |",
        "|---|---|---|---|---|---|---|",
    ]
    for length, by_name in seconds.items():
        cells = [
            f"{statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f})" for s in by_name.values()
        ]
        ratios = [
            statistics.median(
                f(*values) for values in zip(*(by_name[n] for n in systems.NAMES), strict=True)
            )
            for f in (
                lambda b, p, o: o / b,
                lambda b, p, o: p / o,
                lambda b, p, o: (o - b) / (p - b),
            )
        ]
        cells += [f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"| {length} | " + " | ".join(cells) + " |")
    lines += ["", "| | base | published | ours |", "|---|---|---|---|"]
    lines.append("| peak memory, MiB | " + " | ".join(f"{m:,.0f}" for m in memory.values()) + " |")
    shares = [f"{m / memory['base']:.3f}" for m in memory.values()]
    lines.append("| over base | " + " | ".join(shares) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    memory = {n: peak_megabytes(n) for n in tqdm(systems.NAMES, desc="peak memory")}
    text = report(measure(rounds), memory)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
