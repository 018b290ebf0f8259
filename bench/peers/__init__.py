"""The routed projection as others would write it, to be counted beside ours.

Each file holds one way, in our own words; `PEERS` lists them by name. `build(problem, folded,
blocks)` prepares whatever may be prepared once and returns the function of x that is counted.
"""

from collections.abc import Callable
from typing import NamedTuple

from bench.peers import fused_epilogue, linear, official, ours, peft_hooks, shrink_expand


class Peer(NamedTuple):
    """One column of the report."""

    build: Callable
    folded: bool | None  # is the router one vector per expert? None: there is no router


PEERS = {
    "bare linear": Peer(linear.build, None),
    "official": Peer(official.build, False),
    "official + fold": Peer(official.build, True),
    "PEFT": Peer(peft_hooks.build, False),
    "PEFT + fold": Peer(peft_hooks.build, True),
    "vLLM-style": Peer(shrink_expand.build, False),
    "vLLM-style + fold": Peer(shrink_expand.build, True),
    "LoRAFusion-style": Peer(fused_epilogue.build, False),
    "LoRAFusion-style + fold": Peer(fused_epilogue.build, True),
    "ours": Peer(ours.build, True),
    "ours, one launch (opt-in)": Peer(ours.build_one_launch, True),
}
