"""The C++ backend without Python: exact arithmetic on every form, and mutants that must die.

`make sanitize` runs the same program, `tests/native/check.cpp`, under the thread sanitizer, and
`make cross` on another processor.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

CXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler here")

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O1", f"-I{ROOT}/csrc", "-fopenmp", "-Wno-ignored-attributes", "-Wno-psabi"]

# by file: what goes wrong, a text, what it becomes; each is about one line
MUTANTS = {
    "kernels.h": [
        ("the last columns are skipped", "if (k < K)", "if (false)"),
        ("the bias is not gated", "p.bias ? gated.total[token] *", "p.bias ?"),
        ("softmax is a sigmoid", "call.softmax ?", "false ?"),
        ("softmax is not normalised", "gates[e] /= sum", "gates[e] /= 1"),
        ("no gate bias", " + p.gate_bias[e * p.gate_bias_e];", ";"),
        ("the mask's stride is hard-coded", "call.routed[m * call.routed_m]", "call.routed[m]"),
        ("the mask is ignored", "if (call.routed && ", "if (false && call.routed && "),
        ("one scaling serves all", "call.scaling[e] *", "call.scaling[0] *"),
        ("experts are swapped", "* gates[e] * h[c", "* gates[call.E - 1 - e] * h[c"),
        ("gates are ignored", "call.scaling[e] * gates[e] *", "call.scaling[e] *"),
        ("a gate is not counted", "gated.total[m] += gates[e]", "gated.total[m] = gates[e]"),
        ("lora_B's stride is hard-coded", "n * p.lora_B_n;", "n * call.rank;"),
        ("lora_B is taken for contiguous", "(p.lora_B_e == call.rank || call.E == 1)", "true"),
        ("a column is not stored", "n + r < last", "n + r + 1 < last"),
        (
            "a token is not stored",
            "t < COUNT && m + t < call.M; ++t)\n        for",
            "t < COUNT && m + t + 1 < call.M; ++t)\n        for",
        ),
        (
            "the second projection is the first",
            "T>(call, call.projections[1],",
            "T>(call, call.projections[0],",
        ),
        ("silu has the wrong sign", "exponential(-z)", "exponential(z)"),
        ("gelu is the other one", "0.044715f", "0.04f"),
    ],
    "gemm.h": [
        (
            "the last columns of a panel are skipped",
            "std::memcpy(tail, rows[i] + k,",
            "std::memcpy(tail, tail,",
        ),
        (
            "only the last run of K counts",
            "first ? acc[t][half] + run[t][half] :",
            "false ? acc[t][half] :",
        ),
        (
            "the bias of a tile is not gated",
            "(acc[t][1] + high) * total +",
            "acc[t][1] * total + high +",
        ),
        (
            "the last column is not stored",
            "for (int i = 0; n + i < call.N; ++i) narrow",
            "for (int i = 0; n + i + 1 < call.N; ++i) narrow",
        ),
        ("tiles share the first mask", "part.routed += m * call.routed_m", "part.routed += 0"),
        ("tiles share the first gates", "p.gates += m * call.E", "p.gates += 0"),
        ("totals land in the first tile", "all.total.data + m, gated", "all.total.data, gated"),
        ("lora_B's expert is ignored", "from.lora_B)[e * from.lora_B_e +", "from.lora_B)[0 +"),
    ],
    "vectors.h": [
        ("bf16 is truncated", "(bits + 0x7fff + (bits >> 16 & 1)) >> 16", "bits >> 16"),
        ("bf16 vectors are truncated", "bits + 0x7fff + ((bits >> 16) & 1)", "bits"),
        ("fp16 is rounded upwards", "(magnitude + 0xfff +", "(magnitude + 0x1000 +"),
    ],
    "parts.h": [
        ("shrunk totals land in the first tile", "p.total[m + i]", "p.total[i]"),
        (
            "shrunk rows land in the first tile",
            "p.shrunk) + (m + i) * columns",
            "p.shrunk) + i * columns",
        ),
        (
            "the expanded bias is not gated",
            "bias + i * PANEL + WIDTH)) * total",
            "bias + i * PANEL + WIDTH))",
        ),
        (
            "the ragged end is not written",
            "if (at == tail) std::memcpy(y, tail",
            "if (false) std::memcpy(y, tail",
        ),
        ("panels share one lora_B", "const Vector* b = B + i * 2 * columns", "const Vector* b = B"),
        (
            "a rank column is left out",
            "for (int64_t c = 0; c < columns; ++c) {",
            "for (int64_t c = 1; c < columns; ++c) {",
        ),
    ],
}
EACH = [(name, *mutant) for name, mutants in MUTANTS.items() for mutant in mutants]


@pytest.fixture(scope="module")
def checker(tmp_path_factory):
    """The compiled `check.cpp`, without the backend."""
    built = tmp_path_factory.mktemp("native") / "check.o"
    compile_to(built, ROOT / "tests/native/check.cpp", "-c")
    return built


def compile_to(target, source, *rest):
    command = [CXX, *FLAGS, str(source), *map(str, rest), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def survives(sources, checker, folder) -> tuple[bool, str]:
    """Whether the portable build of `sources` passes every check, and what the check printed."""
    program = folder / "check"
    compile_to(program, sources / "portable.cpp", checker)
    done = subprocess.run([program, "portable"], capture_output=True, text=True, timeout=60)
    return done.returncode == 0, done.stdout


def test_the_portable_build_is_exact(checker, tmp_path):
    fine, output = survives(ROOT / "csrc", checker, tmp_path)
    assert fine, output


@pytest.mark.parametrize("mutant", EACH, ids=[mutant[1] for mutant in EACH])
def test_every_mutant_dies(mutant, checker, tmp_path):
    name, what, text, instead = mutant
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    code = (sources / name).read_text()
    assert text in code, f"{name} has no {text!r} any more: bring the mutant up to date"
    (sources / name).write_text(code.replace(text, instead))
    fine, _ = survives(sources, checker, tmp_path)
    assert not fine, f"nobody noticed that {what}"
