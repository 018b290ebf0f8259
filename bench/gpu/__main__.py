"""`make gpu`: correctness and speed on this GPU, written to bench/results/gpu-DEVICE.{json,md}.

    python -m bench.gpu                     everything, in less than eight minutes
    python -m bench.gpu --only replays      one step, shown and not written; may be repeated

Exits with 1 if any step failed, hung or found something wrong; the others run all the same.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import tqdm

from bench import machine
from bench.gpu import report, steps, watchdog

DEADLINE = 475  # seconds
RESULTS = Path("bench/results")


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="Correctness and speed on this GPU."
    )
    parser.add_argument("--only", choices=steps.LIMITS, action="append", help="only this step")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"make gpu {machine.NO_GPU}")
        return 1
    found = {
        "machine": machine.describe(),
        "steps": run_all(options.only or list(steps.LIMITS)),
    }
    if not options.only:
        write(found)
    report.show(found)
    return 0 if report.good(found) else 1


def run_all(names: list[str], limits=None, deadline: float = DEADLINE) -> dict:
    """{step: how it ended and what it found}; whatever does not fit the time is not run."""
    limits, start, found = limits or steps.LIMITS, time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder, tqdm.tqdm(names, unit="step") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            left = deadline - (time.monotonic() - start)
            if left < 1:
                found[name] = {"status": "not run", "seconds": 0.0, "said": "no time was left"}
                continue
            replayed = found.get("replays", {}).get("status") == "ok"
            found[name] = run_one(name, min(limits[name], left), Path(folder), replayed)
    return found


def run_one(name: str, limit: float, folder: Path, one_launch: bool) -> dict:
    """One step in a process of its own."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    outcome = watchdog.run(
        [sys.executable, "-m", "bench.gpu.steps", name, str(result)],
        limit,
        folder / "log.txt",
        {"TRITON_INTERPRET": "0", steps.ONE_LAUNCH: str(int(one_launch))},
    )
    row = vars(outcome).copy()
    if result.exists() and outcome.status != "hung":
        row["result"] = json.loads(result.read_text())
    if outcome.status == "ok":
        del row["said"]
    return row


def write(found: dict) -> None:
    """Both files, named after the device."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = f"gpu-{machine.slug(found['machine']['gpu'])}"
    (RESULTS / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / f"{stem}.md").write_text(report.markdown(found))
    print(f"wrote {RESULTS / stem}.json and .md")


if __name__ == "__main__":
    sys.exit(main())
