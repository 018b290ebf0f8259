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

# (what goes wrong, file, text, what it becomes); each is about one line
MUTANTS = [
    ("the last columns are skipped", "kernels.h", "if (k < K)", "if (false)"),
    ("the bias is not gated", "kernels.h", "p.bias ? gated.total[token] *", "p.bias ?"),
    ("softmax is a sigmoid", "kernels.h", "call.softmax ?", "false ?"),
    ("softmax is not normalised", "kernels.h", "gates[e] /= sum", "gates[e] /= 1"),
    ("no gate bias", "kernels.h", " + p.gate_bias[e * p.gate_bias_e];", ";"),
    ("the mask's stride is hard-coded", "kernels.h", "call.routed[m * call.routed_m]", "call.routed[m]"),
    ("the mask is ignored", "kernels.h", "if (call.routed && ", "if (false && call.routed && "),
    ("one scaling serves all", "kernels.h", "call.scaling[e] *", "call.scaling[0] *"),
    ("experts are swapped", "kernels.h", "* gates[e] * h[c", "* gates[call.E - 1 - e] * h[c"),
    ("gates are ignored", "kernels.h", "call.scaling[e] * gates[e] *", "call.scaling[e] *"),
    ("a gate is not counted", "kernels.h", "gated.total[m] += gates[e]", "gated.total[m] = gates[e]"),
    ("lora_B's stride is hard-coded", "kernels.h", "n * p.lora_B_n;", "n * call.rank;"),
    ("lora_B is taken for contiguous", "kernels.h", "(p.lora_B_e == call.rank || call.E == 1)", "true"),
    ("a column is not stored", "kernels.h", "n + r < last", "n + r + 1 < last"),
    ("a token is not stored", "kernels.h", "t < COUNT && m + t < call.M; ++t)\n        for", "t < COUNT && m + t + 1 < call.M; ++t)\n        for"),
    ("the second projection is the first", "kernels.h", "project<ROWS, T>(call, call.projections[1]", "project<ROWS, T>(call, call.projections[0]"),
    ("silu has the wrong sign", "kernels.h", "exponential(-z)", "exponential(z)"),
    ("gelu is the other one", "kernels.h", "0.044715f", "0.04f"),
    ("the last columns of a panel are skipped", "gemm.h", "std::memcpy(tail, rows[i] + k, (call.K - k) * sizeof(T));", ""),
    ("only the last run of K counts", "gemm.h", "acc[t][half] += run[t][half]", "acc[t][half] = run[t][half]"),
    ("the bias of a tile is not gated", "gemm.h", "(acc[t][1] + load(bias + WIDTH)) * total", "acc[t][1] * total + load(bias + WIDTH)"),
    ("the last column is not stored", "gemm.h", "for (int i = 0; n + i < call.N; ++i) narrow", "for (int i = 0; n + i + 1 < call.N; ++i) narrow"),
    ("tiles share the first mask", "gemm.h", "part.routed += m * call.routed_m", "part.routed += 0"),
    ("tiles share the first gates", "gemm.h", "p.gates += m * call.E", "p.gates += 0"),
    ("totals land in the first tile", "gemm.h", "all.total.data + m, gated", "all.total.data, gated"),
    ("lora_B's expert is ignored", "gemm.h", "from.lora_B)[e * from.lora_B_e +", "from.lora_B)[0 +"),
    ("bf16 is truncated", "vectors.h", "(bits + 0x7fff + (bits >> 16 & 1)) >> 16", "bits >> 16"),
    ("bf16 vectors are truncated", "vectors.h", "bits + 0x7fff + ((bits >> 16) & 1)", "bits"),
    ("fp16 is rounded upwards", "vectors.h", "(magnitude + 0xfff +", "(magnitude + 0x1000 +"),
    ("shrunk totals land in the first tile", "parts.h", "p.total[m + i]", "p.total[i]"),
    ("shrunk rows land in the first tile", "parts.h", "p.shrunk) + (m + i) * columns", "p.shrunk) + i * columns"),
    ("the expanded bias is not gated", "parts.h", "(load(at + WIDTH) + load(bias + i * PANEL + WIDTH)) * total", "load(at + WIDTH) * total + load(bias + i * PANEL + WIDTH)"),
    ("the ragged end is not written", "parts.h", "if (at == tail) std::memcpy(y, tail", "if (false) std::memcpy(y, tail"),
    ("panels share one lora_B", "parts.h", "const Vector* b = B + i * 2 * columns", "const Vector* b = B"),
    ("a rank column is left out", "parts.h", "for (int64_t c = 0; c < columns; ++c) {", "for (int64_t c = 1; c < columns; ++c) {"),
]  # fmt: skip


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


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant[0] for mutant in MUTANTS])
def test_every_mutant_dies(mutant, checker, tmp_path):
    what, name, text, instead = mutant
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    code = (sources / name).read_text()
    assert text in code, f"{name} has no {text!r} any more: bring the mutant up to date"
    (sources / name).write_text(code.replace(text, instead))
    fine, _ = survives(sources, checker, tmp_path)
    assert not fine, f"nobody noticed that {what}"
