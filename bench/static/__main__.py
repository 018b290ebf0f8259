"""`make compile`: every kernel x shipped config, compiled for four GPUs without having one.

    python -m bench.static            the quick part, against the limits and the committed table
    python -m bench.static --full     every case
    python -m bench.static --write    every case; write bench/results/static.json and static.md

Exits with 1 if a limit is not met or a figure got worse than the committed one.
"""

import argparse
import os
import sys

import tqdm
import triton

from bench.static import cases, checks, compiling, table
from bench.static.measure import Row, measure

SUMMARY = "Compile every kernel x shipped config for GPUs that are not here, and judge the result."


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=SUMMARY)
    parser.add_argument("--full", action="store_true", help="every case, not the quick ones")
    parser.add_argument("--write", action="store_true", help="--full, and write the table")
    parser.add_argument("--target", choices=compiling.TARGETS, action="append", help="only these")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    if options.write and options.target:
        parser.error("--write takes every target")

    full = options.full or options.write
    targets = options.target or list(compiling.TARGETS)
    rows = collect(cases.every_case() if full else list(cases.QUICK), targets)
    if options.write:
        table.write(triton.__version__, rows)
    before = table.read().get(triton.__version__)
    problems = [f"{row.key} ({row.tile}): {text}" for row in rows for text in row.problems]
    problems += checks.uncovered(row.kernel for row in rows)
    if before is not None:
        for row in rows:
            worse = checks.regressions(table.as_json(row), before.get(row.key))
            problems += [f"{row.key} ({row.tile}): {text}" for text in worse]
        if full and not options.target:
            gone = before.keys() - {row.key for row in rows}
            problems += [f"{key}: in the committed table, no longer compiled" for key in gone]

    table.show(rows)
    print(f"Triton {triton.__version__}: {len(rows)} kernels, {len(problems)} problems")
    if before is None:
        print("no committed figures for this Triton: held to the limits only")
    for problem in problems:
        print(f"  {problem}")
    return 1 if problems else 0


def collect(calls: list[cases.Case], targets: list[str]) -> list[Row]:
    """Measure every call on every target, with a progress bar."""
    pairs = [(case, target) for target in targets for case in calls if case.runs_on(target)]
    bar = tqdm.tqdm(pairs, unit="call", disable=None)
    rows = []
    for case, target in bar:
        bar.set_postfix_str(f"{target} {case}")
        rows += measure(case, target)
    return rows


if __name__ == "__main__":
    sys.exit(main())
