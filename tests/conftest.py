"""Kernels run in Triton's interpreter: the switch is thrown before any kernel is defined."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # 2-5 times faster on the interpreter's tiles
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from tests import bf16_interpreter

if os.environ["TRITON_INTERPRET"] == "1":
    bf16_interpreter.install()


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU, and say so."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm GPU, and this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
