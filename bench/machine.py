"""What a figure was measured on: machine, versions, commit."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

NO_GPU = "needs a CUDA or ROCm GPU, and this machine has none"


def describe() -> dict:
    """Everything that a reader needs to judge a figure by."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
        **(gpu() if torch.cuda.is_available() else {}),
    }


def gpu() -> dict:
    """The first GPU, its driver and its caches."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "driver": driver(),
        "toolkit": f"ROCm {torch.version.hip}"
        if torch.version.hip
        else f"CUDA {torch.version.cuda}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }


def driver() -> str:
    """The GPU driver's version, as the vendor's tool says; "unknown" without the tool."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    module = Path("/sys/module/amdgpu/version")
    if torch.version.hip and module.exists():
        return module.read_text().strip()
    return (output(query).splitlines() or ["unknown"])[0]


def commit() -> str:
    """The checkout's commit, with a plus if tracked files were changed since."""
    head = output(["git", "rev-parse", "--short=12", "HEAD"])
    changed = output(["git", "status", "--porcelain", "--untracked-files=no"])
    return head + ("+" if changed else "") if head else "unknown"


def cpu_name() -> str:
    """The processor as the kernel names it."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", file.read_text()) if file.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def version(package: str) -> str:
    """An installed package's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"\W+", "_", name).strip("_")


def output(command: list[str]) -> str:
    """What a command prints; nothing if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
