"""Arrows point one way, and importing the package costs and touches nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# what each file may import besides the standard library
ALLOWED = {
    "mogu_kernels/kernels/*.py": {"triton", "mogu_kernels.kernels"},
    "mogu_kernels/tuning.py": set(),
    "mogu_kernels/eager.py": {"torch"},
    "mogu_kernels/router.py": {"torch"},
    "mogu_kernels/cpu.py": {"torch", "mogu_kernels"},
    "mogu_kernels/doctor.py": {"torch", "triton", "mogu_kernels"},
    "mogu_kernels/checks.py": {"torch", "triton", "mogu_kernels"},
    "mogu_kernels/architectures.py": set(),
    "mogu_kernels/checkpoint.py": {
        "torch",
        "safetensors",
        "mogu_kernels.architectures",
        "mogu_kernels.router",
    },
    "mogu_kernels/convert.py": {"torch", "peft", "mogu_kernels.checkpoint"},
    "mogu_kernels/inspection.py": {"torch", "mogu_kernels.checkpoint"},
    "mogu_kernels/plots.py": {"torch", "matplotlib"},
    "mogu_kernels/launch.py": {
        "torch",
        "triton",
        "mogu_kernels.kernels",
        "mogu_kernels.router",
        "mogu_kernels.tuning",
    },
    "mogu_kernels/ops/*.py": {
        "torch",
        "mogu_kernels",
        "mogu_kernels.ops",
        "mogu_kernels.tuning",
    },
    "mogu_kernels/state.py": {"torch"},
    "mogu_kernels/modules.py": {
        "torch",
        "mogu_kernels",
        "mogu_kernels.ops",
        "mogu_kernels.router",
        "mogu_kernels.state",
    },
    "mogu_kernels/handoff.py": {
        "torch",
        "transformers",
        "mogu_kernels.modules",
        "mogu_kernels.state",
    },
    "mogu_kernels/generation.py": {
        "torch",
        "transformers",
        "mogu_kernels.handoff",
        "mogu_kernels.state",
    },
    "mogu_kernels/cli.py": {
        "torch",
        "typer",
        "tqdm",
        "mogu_kernels",
        "mogu_kernels.hf",
        "mogu_kernels.packages",
        "mogu_kernels.router",
    },
    "mogu_kernels/packages.py": {"tqdm"},
    "mogu_kernels/training/templates.py": set(),
    "mogu_kernels/training/files.py": {"pyarrow"},
    "mogu_kernels/training/data.py": {
        "mogu_kernels.training.files",
        "mogu_kernels.training.templates",
    },
    "mogu_kernels/training/*.py": {
        "torch",
        "accelerate",
        "transformers",
        "peft",
        "yaml",
        "tqdm",
        "pyarrow",
        "safetensors",
        "mogu_kernels.checkpoint",
        "mogu_kernels.convert",
        "mogu_kernels.hf",
        "mogu_kernels.modules",
        "mogu_kernels.router",
        "mogu_kernels.state",
        "mogu_kernels.training",
    },
    "mogu_kernels/evaluation/refusal.py": set(),
    "mogu_kernels/evaluation/prompts.py": {"torch", "mogu_kernels.training.templates"},
    "mogu_kernels/evaluation/systems.py": {
        "torch",
        "tqdm",
        "mogu_kernels.evaluation",
        "mogu_kernels.generation",
        "mogu_kernels.state",
    },
    "mogu_kernels/evaluation/pairs.py": {
        "torch",
        "mogu_kernels.checkpoint",
        "mogu_kernels.evaluation",
        "mogu_kernels.state",
    },
    "mogu_kernels/evaluation/judges.py": {"torch", "mogu_kernels.evaluation"},
    "mogu_kernels/evaluation/defences.py": {
        "peft",
        "mogu_kernels",
        "mogu_kernels.checkpoint",
        "mogu_kernels.evaluation",
        "mogu_kernels.hf",
    },
    "mogu_kernels/evaluation/measure.py": {
        "torch",
        "mogu_kernels.evaluation",
        "mogu_kernels.training.data",
    },
    "mogu_kernels/evaluation/report.py": {"torch", "mogu_kernels", "mogu_kernels.evaluation"},
    "mogu_kernels/evaluation/__init__.py": {"mogu_kernels.evaluation"},
    "mogu_kernels/evaluation/sets.py": {"mogu_kernels.packages", "mogu_kernels.training.data"},
    "mogu_kernels/hf.py": {
        "torch",
        "transformers",
        "huggingface_hub",
        "mogu_kernels.architectures",
        "mogu_kernels.checkpoint",
        "mogu_kernels.modules",
        "mogu_kernels.state",
    },
    "mogu_kernels/parallel.py": {
        "torch",
        "mogu_kernels",
        "mogu_kernels.checkpoint",
        "mogu_kernels.checks",
        "mogu_kernels.hf",
        "mogu_kernels.modules",
        "mogu_kernels.state",
    },
    "mogu_kernels/vllm_plugin/settings.py": {"mogu_kernels.checkpoint"},
    "mogu_kernels/vllm_plugin/__init__.py": {"mogu_kernels.vllm_plugin"},
    "mogu_kernels/vllm_plugin/*.py": {
        "torch",
        "numpy",
        "vllm",
        "transformers",
        "prometheus_client",
        "mogu_kernels",
        "mogu_kernels.checkpoint",
        "mogu_kernels.hf",
        "mogu_kernels.parallel",
        "mogu_kernels.router",
        "mogu_kernels.vllm_plugin",
    },
    "reference/*.py": {"torch", "reference"},
}


def imports(path):
    """Every module that `path` imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import absolutely"
            yield node.module


@pytest.mark.parametrize("pattern", ALLOWED)
def test_a_layer_imports_only_what_lies_below_it(pattern):
    files = sorted(ROOT.glob(pattern))
    assert files
    for path in files:
        for name in imports(path):
            if name.split(".")[0] in sys.stdlib_module_names:
                continue
            allowed = ALLOWED[pattern]
            fits = name in allowed or any(
                name.startswith(a + ".") for a in allowed if a != "mogu_kernels"
            )
            assert fits, f"{path.relative_to(ROOT)} imports {name}"


def test_every_file_of_the_package_has_its_place():
    listed = {path for pattern in ALLOWED for path in ROOT.glob(pattern)}
    missing = set(ROOT.glob("mogu_kernels/**/*.py")) - listed
    assert missing == {ROOT / "mogu_kernels/__init__.py"}


def test_kernels_are_launched_from_one_place_only():
    launches = [
        path.name
        for path in ROOT.glob("mogu_kernels/**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and "kernel" in getattr(node.func.value, "id", "")
    ]
    assert launches == ["launch.py"]


def test_import_is_light_and_changes_nothing():
    """No GPU, no transformers, no peft, no environment variable, no logging, and fast."""
    program = """
import logging, os, sys, time
import torch
environment, handlers = dict(os.environ), list(logging.root.handlers)
start = time.perf_counter()
import mogu_kernels
seconds = time.perf_counter() - start
assert seconds < 2, seconds
assert not torch.cuda.is_initialized()
for name in ("transformers", "peft", "triton.runtime.driver.active"):
    assert name not in sys.modules, name
assert dict(os.environ) == environment
assert logging.root.handlers == handlers
print(sorted(mogu_kernels.__all__) == mogu_kernels.__all__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
