"""Decoding on the real model, routed and not: tokens a second, interleaved steps.

    python -m bench.decode

Routing stays on throughout; the base model shares its weights with the routed ones. Written to
`bench/results/decode.md`.
"""

import argparse
import copy
import os
import platform
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

import mogu_kernels as mk
from bench import machine, timing
from demo.smollm2 import NAME, load_smollm2
from mogu_kernels import cpu
from mogu_kernels.hf import seeded_checkpoint

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROUTED = {"base": (), "o_proj": ("o_proj",), "all seven": EVERY}
PROMPT, STEPS = 128, 8
RESULT = Path("bench/results/decode.md")


class Decoder:
    """A model and its cache; every sample is a few more greedy tokens."""

    def __init__(self, base, targets: tuple[str, ...]):
        """A copy of `base` that shares its parameters, with `targets` routed."""
        self.model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        if targets:
            mk.attach(self.model, seeded_checkpoint(self.model, targets))

    def start(self, ids):
        """Read the prompt."""
        out = self.model(ids, use_cache=True)
        self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def steps(self):
        """STEPS tokens."""
        for _ in range(STEPS):
            out = self.model(self.token, past_key_values=self.cache, use_cache=True)
            self.token = out.logits[:, -1:].argmax(-1)


@torch.inference_mode()
def measure(dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Seconds a token by system, one figure a round."""
    base, _ = load_smollm2(dtype)
    decoders = {name: Decoder(base, targets) for name, targets in ROUTED.items()}
    ids = torch.randint(1000, 40000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    for decoder in decoders.values():
        decoder.start(ids)
    bar = tqdm(total=rounds + 2, desc=str(dtype).removeprefix("torch."))
    samplers = {name: timing.sampler(own.steps, 1) for name, own in decoders.items()}
    first = next(iter(samplers))
    timed = samplers[first]
    samplers[first] = lambda: (bar.update(), timed())[1]
    samples = timing.interleaved(samplers, rounds, discarded=2)
    bar.close()
    return samples


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    lines = [
        f"# Routed decoding on {NAME} (dequantised from Q4_1), times the base model's throughput",
        "",
        f"Batch 1, after a prompt of {PROMPT}, routing on throughout, the C++ backend "
        f"({', '.join(cpu.instruction_sets()[:1]) or 'not built'}). Medians and quartiles of "
        f"{rounds} interleaved rounds of {STEPS} tokens. {platform.machine()}, "
        f"{torch.get_num_threads()} threads, OMP_WAIT_POLICY="
        f"{os.environ.get('OMP_WAIT_POLICY', 'unset')}, torch {torch.__version__}, commit "
        f"{machine.commit()}. "
        "Written by `python -m bench.decode`.",
        "",
        "| dtype | routed | throughput / base | quartiles |",
        "|---|---|---|---|",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        samples = measure(dtype, rounds)
        for name in list(ROUTED)[1:]:
            ratios = [b / own for b, own in zip(samples["base"], samples[name], strict=True)]
            spread = timing.spread(ratios)
            lines.append(
                f"| {str(dtype).removeprefix('torch.')} | {name} | {spread.median:.3f} | "
                f"{spread.low:.3f} to {spread.high:.3f} |"
            )
    RESULT.write_text("\n".join(lines) + "\n")
    Console().print("\n".join(lines))


if __name__ == "__main__":
    main()
