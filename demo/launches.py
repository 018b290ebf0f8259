"""How many kernels one projection costs, counted by running it."""

import json
import os
import subprocess
import sys

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

DECODE, PREFILL = 1, 200
VIEWS = {"view", "t", "transpose", "slice", "_unsafe_view", "select", "detach", "alias", "expand"}


class _Counter(TorchDispatchMode):
    """Counts the operations that compute something, each one kernel or more on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in VIEWS:
            self.count += 1
        return func(*args, **(kwargs or {}))


def operations(module: nn.Module, tokens: int) -> int:
    """PyTorch operations of one call on [1, tokens, in_features]."""
    hidden_states = torch.randn(1, tokens, module.in_features)
    with torch.no_grad(), _Counter() as counter:
        module(hidden_states)
    return counter.count


def launches_per_projection() -> dict[str, tuple[str, str]]:
    """(decode, prefill) by system; ours is counted in a process with Triton's interpreter on."""
    import reference

    base = nn.Linear(64, 64, bias=False)
    published = reference.RoutedProjection(
        base,
        *(reference.LoRA(64, 64).eval() for _ in range(2)),
        *(reference.Router(64) for _ in range(2)),
    )
    published.in_features = 64
    ours = subprocess.run(
        [sys.executable, "-m", "demo.launches"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    decode, prefill = json.loads(ours.stdout)
    return {
        "base": (str(operations(base, DECODE)), str(operations(base, PREFILL))),
        "published": (str(operations(published, DECODE)), str(operations(published, PREFILL))),
        "ours": (str(decode), str(prefill)),
    }


def main() -> None:
    """Print the Triton launches of one routed projection, [decode, prefill]."""
    import mogu_kernels as mk
    from bench.trace import Trace

    module, counts = mk.MoGULinear(64, 64, bias=False, dtype=torch.float16), []
    for tokens in (DECODE, PREFILL):
        with torch.no_grad(), Trace() as trace:
            mk.ops.mogu_linear(
                torch.randn(tokens, 64).half(),
                module.weight,
                None,
                module.lora_A,
                module.lora_B,
                module.gate_weight,
                module.gate_bias,
                scaling=2.0,
                backend="triton",
            )
        counts.append(trace.launches)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
