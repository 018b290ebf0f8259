"""What the host pays for one op call (budget 6): microseconds of Python around the computation.

    python -m bench.host

Layers of a call, each timed in interleaved rounds on tiny tensors:

    ops.mogu_linear          the checks, then
    torch.ops.mogu           the dispatcher and the op's own Python, then
    eager.mogu_linear        the computation
    launch.mogu_linear       everything that our code does before Triton's own launcher

Under "nothing computed" the computation is cut out, so that what is left is the cost itself and not
a difference of two large times. Times are the calling thread's own (`time.thread_time`): what
others do on the cores does not count. On a GPU (`make gpu`) the same calls are queued, not waited
for.
"""

import argparse
import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

from bench import machine, timing
from bench.layers import EXPERTS, RANK
from mogu_kernels import checks, eager, launch, ops
from mogu_kernels.ops import library
from tests import oracle

RESULT = Path("out/host.json")
SIZES = {"M": 1, "N": 32, "K": 32, "E": EXPERTS, "rank": RANK}
MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}
CALLS = 200  # in a row, for one sample


def projection(device: str = "cpu") -> oracle.Projection:
    """A projection so small that computing it costs next to nothing."""
    p = oracle.random(**SIZES, dtype=torch.float32, bias=False)
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in p.operands().items()
    }
    return oracle.Projection(**moved)


def layers_of_a_call(p: oracle.Projection, backend: str) -> dict[str, Callable]:
    """The same call, entered further and further down."""
    operands = p.operands()
    arguments = tuple(operands.values())
    config = launch.choose_tiles("mogu_linear", p.x, len(p.weight), EXPERTS * RANK)
    return {
        "F.linear": functools.partial(F.linear, p.x, p.weight),
        "ops.mogu_linear": functools.partial(ops.mogu_linear, **operands, backend=backend),
        "torch.ops.mogu.mogu_linear": functools.partial(
            torch.ops.mogu.mogu_linear, *arguments, False, backend, ""
        ),
        "eager.mogu_linear": functools.partial(eager.mogu_linear, *arguments),
        "launch.mogu_linear": functools.partial(launch.mogu_linear, *arguments, False, None),
        "launch.mogu_linear, tiles given": functools.partial(
            launch.mogu_linear, *arguments, False, config
        ),
    }


def pieces(p: oracle.Projection) -> dict[str, Callable]:
    """What a call does besides computing, one by one: the checks, then the op's own Python."""
    operands = p.x, p.weight, p.bias, p.lora_A, p.lora_B
    return {
        "library.autocast": lambda: library.autocast(p.x.device.type, operands),
        "checks.scaling_per_expert": lambda: checks.scaling_per_expert(p.scaling, len(p.lora_A)),
        "checks.check_linear": lambda: checks.check_linear(p.x, p.weight, p.bias, p.lora_B),
        "checks.check_router": lambda: checks.check_router(
            p.x, p.lora_A, p.gate_weight, p.gate_bias, p.gate, p.routed
        ),
        "checks.check_pair": lambda: checks.check_pair(p.lora_A, p.lora_B),
        "checks.check_backend": lambda: checks.check_backend("eager", p.x),
        "library.text": lambda: library.text(None),
        "library.outside_autocast": lambda: library.outside_autocast(lambda *_: None, "cpu"),
        "launch.choose_tiles": lambda: launch.choose_tiles(
            "mogu_linear", p.x, len(p.weight), EXPERTS * RANK
        ),
    }


@contextlib.contextmanager
def nothing_computed(p: oracle.Projection) -> Iterator[None]:
    """The computation is cut out: eager hands out a ready result, launches do not happen."""
    y, gates = eager.mogu_linear(**p.operands())

    def computed(*_):
        return y, gates

    def launched(kernel, grid, **arguments):
        return None

    with (
        mock.patch.object(eager, "mogu_linear", computed),
        mock.patch.object(launch, "_run", launched),
    ):
        yield


def microseconds(functions: dict[str, Callable], rounds: int, calls: int = CALLS) -> dict:
    """Median and quartiles of one call of each, interleaved."""
    samplers = {
        name: timing.sampler(function, calls, time.thread_time)
        for name, function in functions.items()
    }
    samples = timing.interleaved(samplers, rounds)
    return {
        name: {key: 1e6 * value for key, value in vars(timing.spread(taken)).items()}
        for name, taken in samples.items()
    }


def measure(rounds: int = 25, device: str = "cpu") -> dict:
    """All tables by name: {table: {row: {median, low, high}}}."""
    p = projection(device)
    backend = "eager" if device == "cpu" else "triton"
    functions = layers_of_a_call(p, backend)
    runnable = {k: v for k, v in functions.items() if device != "cpu" or "launch" not in k}
    around = {k: v for k, v in functions.items() if k not in ("F.linear", "eager.mogu_linear")}
    tables = {}
    for mode, context in MODES.items():
        with context():
            tables[f"whole, {mode}"] = microseconds(runnable, rounds)
            with nothing_computed(p):
                tables[f"nothing computed, {mode}"] = microseconds(around, rounds)
    with torch.inference_mode():
        tables["pieces"] = microseconds(pieces(p), rounds)
    return tables


def markdown(tables: dict) -> str:
    """One table of microseconds each."""
    lines = ["# Host microseconds of one call", ""]
    for title, rows in tables.items():
        lines += [f"## {title}", "", "| | median | quartiles |", "|---|--:|--:|"]
        for name, us in rows.items():
            lines.append(f"| {name} | {us['median']:.1f} | {us['low']:.1f} to {us['high']:.1f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and keep the figures under out/."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.host", description="Host cost of a call."
    )
    parser.add_argument("--rounds", type=int, default=25)
    tables = measure(parser.parse_args().rounds)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"machine": machine.describe(), "us": tables}, indent=1) + "\n")
    print(markdown(tables))


if __name__ == "__main__":
    main()
