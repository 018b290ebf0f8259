"""The doctor tells what serves, and why."""

import subprocess
import sys

from mogu_kernels import cpu, doctor


def test_the_doctor_names_what_serves():
    done = subprocess.run(
        [sys.executable, "-m", "mogu_kernels.doctor"], capture_output=True, text=True, check=True
    )
    for subject in ("python", "torch", "CPU tensors", "GPU tensors"):
        assert f"\n{subject} " in "\n" + done.stdout


def test_without_the_extension_the_doctor_says_what_to_do(monkeypatch):
    monkeypatch.setattr(cpu, "instruction_sets", tuple)
    assert "not built; install a C++ compiler" in doctor.diagnose()["CPU tensors"]


def test_findings_stand_in_one_column():
    assert doctor.aligned({"a": 1, "long": "x"}) == "a     1\nlong  x"
