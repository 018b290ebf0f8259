"""One optimiser step of router training: the official block, PEFT with two adapters, ours.

Time (interleaved steps), peak memory (a process each) and bytes saved for the backward pass, on the
real model. PEFT trains two LoRA adapters that are both active, since it has no such router. The
published code has no gradient checkpointing; its block is measured with it as well as ours.
"""

import argparse
import contextlib
import ctypes
import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import mogu_kernels as mk
from bench import machine
from bench.timing import interleaved, ratio, spread
from demo.smollm2 import NAME, load_smollm2
from mogu_kernels.hf import seeded_checkpoint, target_linears
from mogu_kernels.training.losses import gate_loss
from mogu_kernels.training.trainer import recomputed
from reference.model import LoRA, RoutedProjection, Router

NAMES = ("official", "peft", "ours")
RECOMPUTED = ", recomputed"  # with gradient checkpointing
STEPS = (*NAMES, *(name + RECOMPUTED for name in ("official", "ours")))
TOKENS, LABELS = 1024, 32
LEARNING_RATE = 5e-4
RESULTS = Path("bench/results/training.md")


def step_of(name: str) -> Callable[[], None]:
    """One optimiser step on 1,024 tokens: CE of the last 32 and the gates' loss."""
    model, _ = load_smollm2()
    model.requires_grad_(False)
    block = name.removesuffix(RECOMPUTED)
    gates = {"official": _official, "peft": _peft, "ours": _ours}[block](model)
    saving = contextlib.nullcontext if block == name else functools.partial(recomputed, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (1, TOKENS), generator=generator)

    def step() -> None:
        with gates() as own, saving():
            logits = model(input_ids=ids, logits_to_keep=1 + LABELS, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, -LABELS:])
        if found := own():
            real = torch.ones(1, 1, TOKENS, dtype=torch.bool)
            loss = loss + 2 * gate_loss(found, ("glad", "unwill"), torch.ones(1), real).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _official(model: Any) -> Callable[[], Any]:
    """The published block, operation by operation."""
    projections = {}
    for name, linear in target_linears(model, ["o_proj"]).items():
        N, K = linear.weight.shape
        experts = [LoRA(K, N, dropout=0.0).requires_grad_(False) for _ in range(2)]
        projections[name] = RoutedProjection(linear, *experts, Router(K), Router(K))
        model.set_submodule(name, projections[name])
    recorded: list[list[Tensor]] = []

    def take(block: Any, args: Any, output: Tensor) -> None:
        if recorded:
            recorded[0].append(torch.cat([block.last_beta, block.last_alpha], -1))
        del block.last_alpha, block.last_beta  # else they hold the graph of a recomputation

    for block in projections.values():
        block.register_forward_hook(take)

    @contextlib.contextmanager
    def gates():
        recorded.append([])
        own = recorded[0]
        yield lambda: own
        recorded.clear()

    return gates


def _peft(model: Any) -> Callable[[], Any]:
    """Two adapters, both active, both trained."""
    for name in ("glad", "unwill"):
        lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["o_proj"])
        peft.inject_adapter_in_model(lora, model, name)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_adapter(["glad", "unwill"])
    return lambda: contextlib.nullcontext(list)


def _ours(model: Any) -> Callable[[], Any]:
    """Fused projections with unfolded routers."""
    mk.attach(model, seeded_checkpoint(model, ("o_proj",)), trainable=True)
    for module in mk.state.routed_modules(model).values():
        module.lora_A.requires_grad_(False)
        module.lora_B.requires_grad_(False)

    @contextlib.contextmanager
    def gates():
        with mk.record_gates(model) as own:
            yield lambda: list(own.values())

    return gates


def saved_bytes(name: str, width: int) -> float:
    """Bytes a token that one projection saves for the backward pass, beside its input.

    Parameters are not counted, nor what is a view of the input.
    """
    module = nn.Sequential(nn.Linear(width, width, bias=False)).requires_grad_(False)
    module.config = None
    x = torch.randn(61, width, requires_grad=True)  # no size of a parameter
    if name == "official":
        experts = [LoRA(width, width, dropout=0.0).requires_grad_(False) for _ in range(2)]
        block = RoutedProjection(module[0], *experts, Router(width), Router(width))
    elif name == "peft":
        for adapter in ("glad", "unwill"):
            lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"])
            peft.inject_adapter_in_model(lora, module, adapter)
        block = module
        module[0].set_adapter(["glad", "unwill"])
    else:
        block = mk.MoGULinear.from_linear(module[0], router="mlp")
        block.lora_A.requires_grad_(False)
        block.lora_B.requires_grad_(False)
    held = {t.untyped_storage().data_ptr() for t in [x, *block.parameters()]}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held and tensor.ndim and len(x) in tensor.shape:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
    del y
    return sum(storages.values()) / len(x)


def memory(name: str) -> dict[str, float]:
    """Peak MiB of a process that takes two steps, and what the second adds to what it held."""
    command = [sys.executable, "-m", "bench.training", "--memory", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {name} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _memory_here(name: str) -> dict[str, float]:
    step = step_of(name)
    step()  # the optimiser's state is there from now on
    ctypes.CDLL(None).malloc_trim(0)  # what the first step freed goes back to the system
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    step()
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    peak = int(found[1]) * 1024 if found else 0
    return {"peak": peak / 2**20, "step": (peak - before) / 2**20}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--memory", choices=STEPS, help="of one system, in this process")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    if asked.memory:
        print(json.dumps(_memory_here(asked.memory)))
        return
    held = {name: memory(name) for name in tqdm(STEPS, desc="memory", leave=False)}
    steps = {name: step_of(name) for name in tqdm(STEPS, desc="loading", leave=False)}

    def timed(step: Callable[[], None]) -> Callable[[], float]:
        def sample() -> float:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start

        return sample

    samples = interleaved({name: timed(step) for name, step in steps.items()}, asked.rounds)
    table = Table(title=f"One step of router training, {NAME}, {TOKENS} tokens, fp32")
    lines = ["| | " + " | ".join(STEPS) + " |", "|---" + "|---:" * len(STEPS) + "|"]
    table.add_column("")
    for name in STEPS:
        table.add_column(name, justify="right")

    def row(title: str, values: list[str]) -> None:
        table.add_row(title, *values)
        lines.append(f"| {title} | " + " | ".join(values) + " |")

    row("time, x official", [f"{ratio(samples[n], samples['official']):.2f}" for n in STEPS])
    spreads = {name: spread(samples[name]) for name in STEPS}
    row(
        "quartiles / median",
        [f"{s.low / s.median:.2f}-{s.high / s.median:.2f}" for s in spreads.values()],
    )
    row("peak memory, MiB", [f"{held[n]['peak']:,.0f}" for n in STEPS])
    row(
        "peak memory, x official",
        [f"{held[n]['peak'] / held['official']['peak']:.2f}" for n in STEPS],
    )
    row("added by the step, MiB", [f"{held[n]['step']:,.0f}" for n in STEPS])
    row(
        "added by the step, x official",
        [f"{held[n]['step'] / held['official']['step']:.2f}" for n in STEPS],
    )
    for width in (576, 4096):
        saved = [f"{saved_bytes(name, width):,.0f}" if name in NAMES else "" for name in STEPS]
        row(f"saved bytes a token beside the input, d = {width}", saved)
    Console().print(table)
    about = ", ".join(f"{key} {value}" for key, value in machine.describe().items())
    RESULTS.write_text(
        "# Training cost\n\n"
        f"One optimiser step of router training on {NAME} ({TOKENS:,} tokens, fp32, o_proj of all "
        "layers, r = 8; PEFT: two active adapters instead of routers; recomputed: with gradient "
        "checkpointing, which the published code does not have). "
        f"Medians of {asked.rounds} interleaved steps. Written by `make bench-training`.\n\n"
        + "\n".join(lines)
        + f"\n\n{about}\n"
    )


if __name__ == "__main__":
    main()
