"""The steps of `make gpu` by name. One step is one process, so that none takes another down.

    python -m bench.gpu.steps NAME RESULT.json

The process exits with 1 if the step finds something wrong; the result is written all the same.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from bench.layers import LAYERS

TIMING = "timing "
LIMITS = {  # seconds
    "correctness": 240,
    "ceilings": 40,
    "replays": 90,
    **{TIMING + layer: 90 for layer in LAYERS},
    "rows": 80,
    "host": 40,
}
ONE_LAUNCH = "MOGU_BENCH_ONE_LAUNCH"  # set by the parent once the replays went well


def step(name: str) -> Callable[[], dict]:
    """The function behind a name; modules are imported when they are needed."""
    from bench import host
    from bench.gpu import ceilings, correctness, layers, replays, rows

    if name.startswith(TIMING):
        one_launch = os.environ.get(ONE_LAUNCH) == "1"
        return lambda: layers.measure(name.removeprefix(TIMING), one_launch)
    return {
        "correctness": correctness.measure,
        "ceilings": ceilings.measure,
        "replays": replays.measure,
        "rows": rows.measure,
        "host": lambda: host.measure(device="cuda"),
    }[name]


def main() -> int:
    """Run one step."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.steps")
    parser.add_argument("name", choices=LIMITS)
    parser.add_argument("result", type=Path)
    options = parser.parse_args()
    result = step(options.name)()
    options.result.write_text(json.dumps(result))
    return 0 if result.get("ok", True) else 1


if __name__ == "__main__":
    sys.exit(main())
