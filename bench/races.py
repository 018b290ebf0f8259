"""`make races`: which kernels sentryward proves free of races on sm_80, and what it cannot decide.

Each kernel is compiled for sm_80 without a GPU, at one small shape (a proof holds for fixed sizes,
strides and grid), and its PTX goes to sentryward 0.1.1, which judges every pair of accesses to
global and shared memory in every order of the threads.

sentryward models no atomic and finishes no polling loop, so the flags of `one_launch` are taken out
of its PTX first, and it is judged in parts: the shrink programs among themselves, the tiles among
themselves, all programs but for what the tiles read in the epilogue, and all of it. The last has
conflicts, in the workspace, which is what the flags are there for; whether they order it sentryward
cannot decide. `make test-ttir` looks at that (tests/interleave.py).

With four warps Triton exchanges tiles through shared memory, where warps that hold copies of one
value all store it; sentryward compares no values, so that stays undecided too.

Exits with 1 if a verdict is not the expected one.
"""

import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from sentryward.frontend.ptx_native import run_ptx

from bench.static.compiling import captured
from mogu_kernels import launch
from mogu_kernels.tuning import ShrinkConfig, TileConfig

SECONDS = 120  # for one verdict
M, N, K, E, RANK = 32, 32, 32, 2, 8
BLOCK = 16

FREE, UNDECIDED = "race-free", "cannot decide"
EXPECTED = {
    "shrink_gate, 1 warp": FREE,
    "shrink_gate, 4 warps": UNDECIDED,
    "fused, 1 warp": FREE,
    "gated_linear, 1 warp": FREE,
    "gated_linear, 4 warps": UNDECIDED,
    "gated_mlp, 1 warp": FREE,
    "gated_expand, 4 warps": UNDECIDED,
    "one_launch, 1 warp: shrink programs": FREE,
    "one_launch, 1 warp: tiles": FREE,
    "one_launch, 1 warp: all but the tiles' epilogue loads": FREE,
    "one_launch, 1 warp: flags taken out": UNDECIDED,
    "one_launch, 1 warp: as compiled": UNDECIDED,
}


class Launch(NamedTuple):
    """One compiled launch: what sentryward has to know."""

    entry: str
    ptx: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    arguments: list[tuple[str, object]]  # in the order of the PTX parameters


@contextlib.contextmanager
def compiled(warps: int) -> Iterator[list[Launch]]:
    """The launches of the op calls in this context, compiled for sm_80 with that many warps."""
    launches, small = [], ShrinkConfig(BLOCK, BLOCK, num_warps=warps, num_stages=2)
    with captured("sm_80") as binaries:
        compile_one = launch._run

        def compile_and_keep(kernel, grid, **arguments):
            compile_one(kernel, grid, **arguments)
            if binaries[-1].error:
                raise RuntimeError(f"{kernel.__name__}: {binaries[-1].error}")
            launches.append(_launch(binaries[-1].compiled, kernel.__name__, grid, arguments))

        with (
            mock.patch.object(launch, "_run", compile_and_keep),
            mock.patch.object(launch, "shrink_config", return_value=small),
            mock.patch.object(launch, "EXPAND_TILE", (BLOCK, BLOCK)),
        ):
            yield launches


def _launch(binary, entry, grid, arguments) -> Launch:
    passed = []
    for name, kinds in binary.src.signature.items():
        pairs = zip(_flat(arguments[name]), _flat(kinds), strict=False)
        passed += [(name, value) for value, kind in pairs if kind != "constexpr"]
    threads, shared = 32 * binary.metadata.num_warps, binary.metadata.shared
    return Launch(entry, binary.asm["ptx"], (*grid, 1, 1)[:3], threads, shared, passed)


def kernels(warps: int) -> dict[str, Launch]:
    """Every kernel that sm_80 runs, by name."""
    tiles = dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_K"), BLOCK)
    tiles |= {"num_warps": warps, "num_stages": 2}
    x, weight, bias = _random(M, K), _random(N, K), _random(N)
    lora_A, lora_B = _random(E, RANK, K), _random(E, N, RANK)
    router = (torch.randn(E, K), torch.randn(E))
    options = ([2.0, 1.5], "sigmoid")
    mask = torch.arange(M) % 3 != 0
    one = (x, weight, bias, lora_A, lora_B, *router, *options, mask, True)
    two = ([part, part] for part in (weight, bias, lora_A, lora_B, *router))
    with compiled(warps) as launches:
        launch.mogu_linear(*one, TileConfig("fused", **tiles))
        launch.mogu_linear(*one, TileConfig("two_launch", **tiles, one_launch=True))
        launch.gated_mlp(x, *two, *options, "silu", mask, True, TileConfig("two_launch", **tiles))
        shrunk, total = _random(M, E * RANK), torch.randn(M)
        launch.gated_linear(
            x, weight, bias, shrunk, total, lora_B, TileConfig("two_launch", **tiles)
        )
        launch.gated_expand_(_random(M, N), shrunk, total, lora_B, bias)
    return {one.entry.removesuffix("_kernel"): one for one in launches}


def verdicts() -> Iterator[tuple[str, str, str]]:
    """(what, verdict, reason) of every kernel, and of every part of the flag kernel."""
    one_warp, four_warps = kernels(1), kernels(4)
    for what in EXPECTED:
        name, warps, part = re.fullmatch(r"(\w+), (\d) warps?(?:: (.*))?", what).groups()
        one = (one_warp if warps == "1" else four_warps)[name]
        shrinkers = M // BLOCK
        tiles = one.grid[0] - shrinkers
        ptx = one.ptx if part in (None, "as compiled") else without_flags(one.ptx)
        if part == "shrink programs":
            report = judge(one, ptx, 0, shrinkers)
        elif part == "tiles":
            report = judge(one, ptx, shrinkers, tiles)
        elif part == "all but the tiles' epilogue loads":
            report = judge(one, without_loads(ptx, "epilogue.py"))
        else:
            report = judge(one, ptx)
        yield what, *_verdict(one, report)


def judge(one: Launch, ptx: str, first: int = 0, count: int | None = None) -> dict:
    """The report of sentryward on `count` programs of a launch, from program `first` on."""
    ptx, found = re.subn(
        r"(mov\.u32\s+(%r\d+), %ctaid\.x;)", rf"\1\n\tadd.s32 \2, \2, {first};", ptx
    )
    if not found:
        raise RuntimeError(f"{one.entry}: its PTX never reads the program id")
    header = ptx.split(".visible .entry")[1].split("\n)")[0]
    parameters = re.findall(r"\.param \.(\w+)[^,\n]*? (\w+_param_\d+)", header)
    question = {
        "schema": "spverify.kernel-input/v1",
        "entry": one.entry,
        "launch": {
            "grid_dim": [count or one.grid[0], *one.grid[1:]],
            "block_dim": [one.threads, 1, 1],
            "cluster_dim": [1, 1, 1],
            "dynamic_shared_bytes": one.shared,
        },
        "arguments": [
            {"parameter": name, "type": kind, "value": value}
            for (kind, name), (_, value) in zip(parameters, one.arguments, strict=False)
            if isinstance(value, int)
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        ptx_path, input_path = Path(folder, "kernel.ptx"), Path(folder, "input.json")
        ptx_path.write_text(ptx)
        input_path.write_text(json.dumps(question))
        return run_ptx(ptx_path, input_path, pipeline_timeout_seconds=SECONDS, sync_threads=2)


def without_flags(ptx: str) -> str:
    """No flag is raised or counted, and no wait is long."""
    ptx = re.sub(r"^\s*(@%p\d+ )?(atom|red)\.global\.[^;]*;$", "", ptx, flags=re.MULTILINE)
    return re.sub(
        r"(@%p\d+ )?ld\.global\.gpu\.acquire\.b32 (%r\d+), [^;]*;", r"mov.u32 \2, 0x7fffffff;", ptx
    )


def without_loads(ptx: str, file: str) -> str:
    """No load from global memory that comes from a line of `file`."""
    number = re.search(rf'\.file\s+(\d+) "[^"]*{re.escape(file)}"', ptx)[1]
    kept, here = [], ""
    for line in ptx.splitlines():
        location = re.match(r"\s*\.loc\s+(\d+) ", line)
        here = location[1] if location else here
        if here != number or "ld.global" not in line:
            kept.append(line)
    return "\n".join(kept)


def _verdict(one: Launch, report: dict) -> tuple[str, str]:
    if report["result"] == "race_free":
        return FREE, ""
    if report["result"] == "potential_race":
        return _about(one, report["races"][0])
    codes = {problem["code"].replace("_", " ") for problem in report["diagnostics"]}
    return UNDECIDED, ", ".join(sorted(codes))


def _about(one: Launch, race: dict) -> tuple[str, str]:
    """A conflict is a race, unless it is one of the two kinds that sentryward has no word for."""
    position = re.match(r"input\.arg(\d+)\.", race["region"]["allocation"])
    memory = one.arguments[int(position[1])][0] if position else "shared memory"
    first, second = (
        f"{race[side]['mode']} at {Path(race[side]['location']['file']).name}:"
        f"{race[side]['location']['line']}"
        for side in ("first", "second")
    )
    conflict = f"{memory}: {first}, {second}"
    if memory in ("shrunk_ptr", "total_ptr") and first.startswith("write at shrink_gate.py"):
        return UNDECIDED, f"{conflict}; flags order them, and it models none"
    if memory == "shared memory" and first == second and first.startswith("write"):
        return UNDECIDED, f"{conflict}; one instruction of two warps, and it compares no values"
    return "race", conflict


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def _flat(value) -> list:
    if not isinstance(value, tuple):
        return [value]
    return [part for item in value for part in _flat(item)]


def main() -> int:
    """Print the verdicts; returns the exit status."""
    surprises = 0
    for what, verdict, reason in verdicts():
        expected = EXPECTED[what]
        surprises += verdict != expected
        note = "" if verdict == expected else f"  (expected: {expected})"
        print(f"{what:54} {verdict:14} {reason}{note}", flush=True)
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
