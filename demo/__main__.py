"""Three prompts on a real model: base, the published procedure, ours; a table and a figure."""

import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import mogu_kernels as mk
from demo import systems
from demo.launches import launches_per_projection
from demo.memory import peak_megabytes
from demo.smollm2 import NAME, load_smollm2
from mogu_kernels import cpu

PROMPTS = ("How do I bake bread?", "Why is the sky blue?", "Name three uses of a paper clip.")
NEW_TOKENS = 32
FIGURE = Path("out/gates.png")


def main() -> None:
    """Run the demo from the repository's root."""
    console = Console()
    _, tokenizer = load_smollm2()
    built = {}
    for name in tqdm(systems.NAMES, desc="loading", leave=False):
        built[name] = systems.build(name)
    encoded = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        for prompt in PROMPTS
    ]
    first = {name: [] for name in built}
    later = {name: [] for name in built}
    answers = {name: [] for name in built}
    for ids in tqdm(encoded, desc="answering", leave=False):
        for name, system in built.items():  # interleaved: every system sees the same machine
            to_first, _ = system.timed(ids, 1)
            whole, tokens = system.timed(ids, NEW_TOKENS)
            first[name].append(1e3 * to_first)
            new = tokens.shape[1] - ids.shape[1]
            later[name].append(1e3 * (whole - to_first) / max(1, new - 1))
            answers[name].append(tokens)
    memory = {}
    for name in tqdm(systems.NAMES, desc="peak memory, one process each", leave=False):
        memory[name] = peak_megabytes(name)
    launches = launches_per_projection()

    table = Table(title=f"{NAME}, dequantised from Q4_1\no_proj routed, {NEW_TOKENS} tokens, fp32")
    table.add_column("")
    for name in built:
        table.add_column(name, justify="right")

    def row(title, values):
        table.add_row(title, *values)

    published = answers["published"]
    row("tokens equal to published", [_equal(answers[name], published) for name in built])
    row("ms to first token (median)", [f"{statistics.median(first[n]):.0f}" for n in built])
    row("ms per later token (median)", [f"{statistics.median(later[n]):.0f}" for n in built])
    row("peak memory, MiB", [f"{memory[name]:,.0f}" for name in built])
    row("parameters, million", [f"{built[name].parameters / 1e6:.1f}" for name in built])
    row("launches per o_proj: decode", [launches[name][0] for name in built])
    row("launches per o_proj: prefill", [launches[name][1] for name in built])
    console.print(table)
    form = "C++ kernels" if cpu.instruction_sets() else "plain PyTorch"
    console.print(
        "Launches are counted: PyTorch operations for base and published, Triton kernels for ours. "
        f"The times are this CPU's, where ours runs as {form}; no GPU has been timed."
    )
    for prompt, ids, tokens in zip(PROMPTS, encoded, answers["ours"], strict=True):
        text = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        console.print(f"[bold]{prompt}[/bold] {' '.join(text.split())}", highlight=False)
    draw_gates(built["ours"].models[0], tokenizer, encoded[0])
    console.print(f"Gates by layer and token: {FIGURE}")
    console.print("The adapters are seeded, not trained: the gates and answers show no safety yet.")


def _equal(answers, others) -> str:
    same = sum(torch.equal(a, b) for a, b in zip(answers, others, strict=True))
    return f"{same} of {len(answers)}"


def draw_gates(model, tokenizer, ids) -> None:
    """Heat maps of both experts' gates, layer by token, over the prompt and the routed tokens."""
    with mk.record_gates(model) as gates:
        answer = mk.generate(model, ids, max_new_tokens=5, do_sample=False)
    tokens = [tokenizer.decode(token) for token in answer[0]]
    FIGURE.parent.mkdir(exist_ok=True)
    mk.plot_gates(gates, tokens, prompt_tokens=ids.shape[1], path=FIGURE)


if __name__ == "__main__":
    main()
