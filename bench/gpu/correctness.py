"""The gpu-marked tests, compiled and run here, in processes of their own.

Compiling takes most of their time, so they run in parts, by dtype; together these are the suite.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

PARTS = (
    "f32",
    "bf16 and not f32",
    "f16 and not bf16 and not f32",
    "not f32 and not f16",  # bf16 has f16 in it
)
SUITE = "tests/test_gpu.py"
COUNTED = ("tests", "failures", "errors", "skipped")
SHOWN = 20  # failed tests that are named


def measure() -> dict:
    """Counts, names of failed tests, and whether all went well."""
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{part}.xml" for part in range(len(PARTS))]
        processes = [
            subprocess.Popen(command(part, report), env=os.environ | {"TRITON_INTERPRET": "0"})
            for part, report in zip(PARTS, reports, strict=True)
        ]
        for process in processes:
            process.wait()
        return summary(reports)


def command(part: str, report: Path) -> list[str]:
    """Pytest on one part of the suite."""
    return [
        *(sys.executable, "-m", "pytest", "-q", "--tb=line", "-m", "gpu", "-k", part),
        *("-p", "no:cacheprovider", "--junit-xml", str(report), SUITE),
    ]


def summary(reports: Iterable[Path]) -> dict:
    """Counts added up over JUnit files; a part that left none counts as an error."""
    counts, failed = dict.fromkeys(COUNTED, 0), []
    for report in reports:
        if not report.exists():
            counts["errors"] += 1
            failed.append(f"part {report.stem} ended without a report")
            continue
        suite = ElementTree.parse(report).getroot().find("testsuite")
        for name in COUNTED:
            counts[name] += int(suite.get(name, 0))
        failed += [
            case.get("name")
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    good = passed > 0 and not counts["failures"] and not counts["errors"] and not counts["skipped"]
    return {"passed": passed, **counts, "failed": failed[:SHOWN], "ok": good}
