"""Whole generation on the real model: base, published, replay and shadow, in one interleaved run.

`make bench` writes `bench/results/generation.md`: times are this machine's, ratios the result.
"""

import argparse
import itertools
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import mogu_kernels as mk
import reference
from bench import machine, timing
from demo import systems
from demo.memory import peak_megabytes
from demo.published import published_model
from demo.smollm2 import NAME, load_smollm2

NEW_TOKENS = 64
PROMPTS = (128, 1024)
RESULT = Path("bench/results/generation.md")


class Clock:
    """A streamer that notes when every token comes."""

    def __init__(self):
        self.start = time.perf_counter()
        self.times: list[float] = []

    def put(self, value):
        """A token, or first of all the prompt."""
        self.times.append(time.perf_counter() - self.start)

    def end(self):
        """Nothing is held back."""


def build() -> dict[str, Callable[[Tensor, Clock], object]]:
    """Ways to answer with NEW_TOKENS tokens, greedy, whatever the tokens are."""
    base, _ = load_smollm2()
    routed, _ = load_smollm2()
    checkpoint = systems.seeded(base)
    published = published_model(base, checkpoint)
    mk.attach(routed, checkpoint)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}

    def ours(handoff):
        return lambda ids, clock: mk.generate(
            routed, ids, handoff=handoff, streamer=clock, **options
        )

    return {
        "base": lambda ids, clock: base.generate(
            ids, attention_mask=torch.ones_like(ids), streamer=clock, **options
        ),
        "published": lambda ids, clock: reference.mogu_generate(published, base, ids, NEW_TOKENS),
        "replay": ours("replay"),
        "shadow": ours("shadow"),
    }


def measure(rounds: int) -> dict[int, dict[str, list[dict[str, float]]]]:
    """Seconds in all, to the first token and of the longest gap, A B C D A B ..., one warm-up."""
    built = build()
    generator = torch.Generator().manual_seed(0)
    found = {length: {name: [] for name in built} for length in PROMPTS}
    with tqdm(total=len(PROMPTS) * (rounds + 1) * len(built), desc="generation") as bar:
        for length in PROMPTS:
            ids = torch.randint(1000, 40000, (1, length), generator=generator)
            for turn in range(rounds + 1):
                for name, answer in built.items():
                    clock = Clock()
                    answer(ids, clock)
                    taken = {"all": time.perf_counter() - clock.start}
                    if times := clock.times[1:]:  # after the prompt
                        gaps = [b - a for a, b in itertools.pairwise(times)]
                        taken |= {"first": times[0], "gap": max(gaps)}
                    if turn:
                        found[length][name].append(taken)
                    bar.update()
    return found


def report(found, memory) -> str:
    """Markdown: medians with quartiles, and the ratios that the project promises."""
    rounds = len(next(iter(found.values()))["base"])
    lines = [
        f"# Whole generation, {NAME} (dequantised from Q4_1), o_proj routed",
        "",
        f"{NEW_TOKENS} new tokens, greedy, fp32, batch 1, {torch.get_num_threads()} threads, "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, commit "
        f"{machine.commit()}, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}. "
        f"Medians (quartiles) of {rounds} interleaved rounds; compare ratios, not times. Added: "
        "seconds more than base takes.",
        "",
        "| | " + " | ".join(f"prompt of {length}" for length in found) + " | bound |",
        "|---|" + "---|" * (len(found) + 1),
    ]

    def row(title, function, bound):
        cells = []
        for by_name in found.values():
            interleaved = zip(*by_name.values(), strict=True)
            own = [function(dict(zip(by_name, each, strict=True))) for each in interleaved]
            spread = timing.spread(own)
            cells.append(f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})")
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {bound} |")

    for name in next(iter(found.values())):
        row(f"{name}, seconds", lambda own, name=name: own[name]["all"], "")
    for name, bound in (("replay", ""), ("shadow", "0.20")):
        row(
            f"added by {name} / added by published",
            lambda own, name=name: (
                (own[name]["all"] - own["base"]["all"])
                / (own["published"]["all"] - own["base"]["all"])
            ),
            bound,
        )
    row("shadow / base", lambda own: own["shadow"]["all"] / own["base"]["all"], "1.25 at 128")
    row(
        "published / shadow",
        lambda own: own["published"]["all"] / own["shadow"]["all"],
        "2 at 1,024",
    )
    row(
        "time to the first token, shadow / base",
        lambda own: own["shadow"]["first"] / own["base"]["first"],
        "1.15",
    )
    row(
        "longest gap, shadow / replay",
        lambda own: own["shadow"]["gap"] / own["replay"]["gap"],
        "0.50",
    )
    lines += ["", "| | base | published | ours |", "|---|---|---|---|"]
    lines.append("| peak memory, MiB | " + " | ".join(f"{m:,.0f}" for m in memory.values()) + " |")
    shares = [f"{m / memory['base']:.3f}" for m in memory.values()]
    lines.append("| over base | " + " | ".join(shares) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    memory = {n: peak_megabytes(n) for n in tqdm(systems.NAMES, desc="peak memory")}
    text = report(measure(rounds), memory)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
