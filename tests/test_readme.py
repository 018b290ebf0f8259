"""The README's code runs as it stands, top to bottom."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.model
def test_readme_code_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "routed 8 projections (o_proj)" in printed
    assert "torch.Size([1, 9, 2])" in printed


def test_readme_commands_are_targets():
    targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in re.findall(r"make ([\w-]+(?:\.\d)?)", (ROOT / "README.md").read_text()):
        assert command in targets


def test_readme_names_only_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:mogu_kernels|reference|demo|bench|tests)/[\w/.-]*)`", text):
        assert (ROOT / name).exists(), name
