"""`make tune-cpu`: where the CPU backend's two forms cross, for mogu_kernels/configs/ISA/.

Few tokens go through the form that reads the weight once, many through the blocked GEMM. Both are
timed in turn on cold weights at every size; the change-over is the number of tokens up to which the
first is the faster one in the median over the sizes.
"""

import functools
import json
import statistics
import sys

import torch
from tqdm import tqdm

from bench import timing
from bench.cpu import DTYPES, SIZES, copies
from mogu_kernels import cpu, tuning

TOKENS = (4, 6, 8, 10, 12, 16, 20, 24, 32)
NAMES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
ROUNDS = 5


def ratio(dtype: torch.dtype, size: int, tokens: int) -> float:
    """Seconds of the form for few tokens over those of the blocked one."""
    made = copies(size, tokens, dtype)
    x = torch.randn(tokens, size).to(dtype)

    def walk(most):
        for own in (one.projection for one in made):
            operands = (own.weight, None, own.lora_A, own.lora_B, own.gate_weight, own.gate_bias)
            cpu.project(x, (operands,), None, own.scaling, "sigmoid", None, False, None, most)

    forms = {name: functools.partial(walk, most) for name, most in (("few", 10**6), ("many", 0))}
    samplers = {name: timing.sampler(form, 1) for name, form in forms.items()}
    samples = timing.interleaved(samplers, ROUNDS)
    return timing.ratio(samples["few"], samples["many"])


def main() -> int:
    """Measure and write."""
    if not cpu.instruction_sets():
        print("make tune-cpu needs the C++ backend: install again with a C++ compiler")
        return 1
    isa = cpu.instruction_sets()[0]
    dtypes = DTYPES | {"fp16": torch.float16}
    bar = tqdm(total=len(dtypes) * len(TOKENS) * len(SIZES), desc=isa)
    for name, dtype in dtypes.items():
        medians = {}
        for tokens in TOKENS:
            ratios = []
            for size in SIZES:
                ratios.append(ratio(dtype, size, tokens))
                bar.update()
            medians[tokens] = statistics.median(ratios)
        most = change_over(medians)
        path = tuning.table_path(isa, NAMES[name])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"most_tiled": most}) + "\n")
        shown = ", ".join(f"{tokens}: {median:.2f}" for tokens, median in medians.items())
        tqdm.write(f"{path}: {most} tokens; few / many at {shown}")
    return 0


def change_over(medians: dict[int, float]) -> int:
    """The most tokens before the first number at which the form for few is the slower one."""
    most = 1
    for tokens, median in medians.items():
        if median > 1:
            break
        most = tokens
    return most


if __name__ == "__main__":
    sys.exit(main())
