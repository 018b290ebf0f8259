"""After the benchmarks: ratios to the bare linear, from interleaved rounds."""

import pytest

RATIOS: dict[str, dict[str, float]] = {}  # group: {implementation: ratio}


@pytest.fixture
def ratios():
    """Where a benchmark puts its ratio."""
    return RATIOS


def pytest_terminal_summary(terminalreporter):
    """One line a group: what a drifting machine disturbs least."""
    if not RATIOS:
        return
    terminalreporter.section("times the bare linear, medians of interleaved rounds")
    for group, row in RATIOS.items():
        cells = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row.items())
        terminalreporter.line(f"{group}: {cells}")
