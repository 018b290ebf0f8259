"""Every fault in a kernel is found: the tests are worth what they catch."""

import pytest
import torch
from triton.runtime.errors import InterpreterError

from bench.trace import Trace
from mogu_kernels import ops
from tests import cases, mutants, oracle, red_zones

# few cases that together reach every line: strided and guarded operands, exact and random values
BATTERY = [
    ("m17-n136-k72-e2-r8-softmax", "f16"),
    ("m37-n72-k48-e1-r1-routed", "f32"),
    ("m33-n40-k129-e3-r5-routed", "bf16"),
    ("m35-n67-k33-e8-r7", "f16"),
    ("m19-n72-k40-e8-r17", "f16"),
]
KERNEL_OF = {"fused": ["fused"], "gated_linear": ["two_launch"], "shrink_gate": ["two_launch"]}


def battery(file):
    """The three gates, red zones, strides and masks over the cases that run `file`."""
    kernels = KERNEL_OF.get(file, ["fused", "two_launch"])
    for shape, dtype in BATTERY:
        for kernel in kernels:
            if (shape, kernel) not in cases.PAIRS:
                continue
            config = cases.KERNELS[kernel]
            make = {"backend": "triton", "config": config, "return_gates": True}
            projection = cases.projection(shape, dtype)
            projection.routed = torch.arange(len(projection.x)) % 3 != 0
            for operands in (red_zones.guarded(projection), red_zones.strided(projection)):
                with red_zones.around_outputs(), Trace():
                    y, gates = ops.mogu_linear(**operands.operands(), **make)
                oracle.assert_matches(actual=y, projection=projection, gates=gates)


def test_the_battery_passes_on_the_real_kernels():
    for file in ("fused", "gated_linear"):
        battery(file)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on red zones
@pytest.mark.parametrize(
    ("fault", "file"), [(f, file) for f in mutants.FAULTS for file in mutants.files_of(f)]
)
def test_a_mutant_dies(fault, file):
    with mutants.mutant(fault, file), pytest.raises((AssertionError, InterpreterError)):
        battery(file)
