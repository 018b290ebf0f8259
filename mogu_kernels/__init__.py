"""MoGU safety routing as fused kernels behind drop-in modules."""

from mogu_kernels import ops
from mogu_kernels.checkpoint import MoGUCheckpoint, MoGUConfig, load_checkpoint, save_checkpoint
from mogu_kernels.generation import generate
from mogu_kernels.hf import attach, detach
from mogu_kernels.modules import MoGUGatedMLP, MoGULinear
from mogu_kernels.plots import plot_gates
from mogu_kernels.router import Router, fold_router
from mogu_kernels.state import record_gates, routing

__all__ = [
    "MoGUCheckpoint",
    "MoGUConfig",
    "MoGUGatedMLP",
    "MoGULinear",
    "Router",
    "attach",
    "detach",
    "fold_router",
    "generate",
    "load_checkpoint",
    "ops",
    "plot_gates",
    "record_gates",
    "routing",
    "save_checkpoint",
]
