"""Peak memory of one system in a process of its own: `python -m demo.memory ours`."""

import re
import subprocess
import sys
from pathlib import Path

from demo.smollm2 import load_smollm2
from demo.systems import build


def peak_megabytes(name: str) -> float:
    """Peak resident memory of loading `name` and answering once, in MiB (Linux)."""
    done = subprocess.run(
        [sys.executable, "-m", "demo.memory", name], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"measuring {name} failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)


if __name__ == "__main__":
    _, tokenizer = load_smollm2()
    ids = tokenizer("The weather today is", return_tensors="pt")["input_ids"].repeat(1, 25)
    build(sys.argv[1], stop=False).generate(ids, 32)
    # of this program alone; ru_maxrss would count what the parent had before the exec
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)
