"""Runs a command that may never return, and returns."""

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

GRACE = 10  # seconds that a killed process may take to go; one stuck in a driver is left behind


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a process ended: "ok", "failed" or "hung"; `said` is the end of what it printed."""

    status: str
    seconds: float
    said: str


def run(
    command: Sequence[str], limit: float, log: Path, environment: dict | None = None
) -> Outcome:
    """Run `command` for at most `limit` seconds; its output goes to `log`.

    It gets a process group of its own, so that what it started is killed with it.
    """
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
        try:
            status = "failed" if process.wait(limit) else "ok"
        except subprocess.TimeoutExpired:
            status = "hung"
        except BaseException:  # Ctrl-C: leave nothing running
            kill(process)
            raise
        if status == "hung":
            kill(process)
    return Outcome(status, time.monotonic() - start, tail(log))


def kill(process: subprocess.Popen) -> None:
    """Kill the whole group, and do not wait for ever."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(GRACE)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        return


def tail(log: Path, size: int = 2000) -> str:
    """The last characters of a log."""
    return log.read_text(errors="replace").strip()[-size:]
