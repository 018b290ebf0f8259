"""What this machine will use, and why: `python -m mogu_kernels.doctor`."""

import importlib.util
import platform
import sys
from collections.abc import Mapping

import torch

from mogu_kernels import cpu, tuning


def diagnose() -> dict[str, str]:
    """One finding by subject, in words."""
    found = {
        "python": f"{platform.python_version()} on {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
    }
    sets = cpu.instruction_sets()
    if sets:
        found["CPU tensors"] = f"C++ kernels for {sets[0]} (of {', '.join(sets)})"
    else:
        found["CPU tensors"] = (
            "plain PyTorch (eager): the C++ kernels were not built; install a C++ compiler, then "
            "this package again"
        )
    found["CPU tensors in fp64, and gradients"] = "plain PyTorch (eager)"
    if importlib.util.find_spec("triton") is None:
        found["GPU tensors"] = "cannot be served: install triton"
        return found
    import triton

    found["triton"] = triton.__version__
    if not torch.cuda.is_available():
        found["GPU tensors"] = "none here: torch sees no CUDA or ROCm GPU"
        return found
    from mogu_kernels import launch

    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    measured = [d for d in ("f32", "f16", "bf16") if tuning.table_path(name, d).is_file()]
    tiles = (
        f"measured for {', '.join(measured)}" if measured else "heuristic (`make tune` measures)"
    )
    found["GPU tensors"] = f"Triton kernels on {name} ({launch.target(device)} tiles, {tiles})"
    return found


def aligned(findings: Mapping[str, object]) -> str:
    """One line per subject, the findings in a column."""
    width = max(map(len, findings))
    return "\n".join(f"{subject:<{width}}  {finding}" for subject, finding in findings.items())


def main() -> None:
    """Print the findings."""
    sys.stdout.write(aligned(diagnose()) + "\n")


if __name__ == "__main__":
    main()
