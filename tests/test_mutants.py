"""Every fault in a kernel is found: the tests are worth what they catch."""

import pytest
from triton.runtime.errors import InterpreterError

from mogu_kernels import launch
from tests import batteries, mutants


@pytest.mark.parametrize("file", batteries.OPS_OF)
def test_the_battery_passes_on_the_real_kernels(file):
    batteries.battery(file)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on red zones
@pytest.mark.parametrize(
    ("fault", "file"), [(f, file) for f in mutants.FAULTS for file in mutants.files_of(f)]
)
def test_a_mutant_dies(fault, file, monkeypatch):
    monkeypatch.setattr(launch, "_FLAGS", {})  # a mutant may leave them up
    with mutants.mutant(fault, file), pytest.raises((AssertionError, InterpreterError)):
        batteries.battery(file)
