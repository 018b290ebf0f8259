"""The static gate goes red on what it is there for, and reads binaries correctly.

Tests run in Triton's interpreter, which compiles nothing: what must be compiled is compiled in one
process beside this one.
"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from bench.static import checks, resources
from bench.static.compiling import Launch
from bench.static.resources import Resources

FINE = Resources(
    registers=154, stack=0, spills=0, shared=98304, tensor_columns=0, warps=8, blocks=1,
    instructions=1500, dots={"HGMMA": 5}, atomics=0, float_atomics=0, traps=0,
)  # fmt: skip
ROW = {"launches": 2, "ours": dataclasses.asdict(FINE), "plain": None, "problems": []}

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDL.LU R4, [R1+0x8] ;        /* 0x0000000401047983 */
        /*0020*/               @P1 STL.64 [R1], R2 ;            /* 0x0000000201007387 */
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10] ;
        /*0050*/                   REDUX.SUM UR4, R2 ;
        /*0060*/                   ATOMS.OR RZ, [UR5+0x14], R3 ;
        /*0070*/                   ATOMG.E.ADD.STRONG.GPU PT, R3, desc[UR4][R2.64], R5 ;
        /*0080*/              @!P2 RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*0090*/                   REDG.E.ADD.BF16_V2.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*10000*/                  BPT.TRAP 0x1 ;
"""
GCN = """
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
\tglobal_atomic_add v1, v[2:3], v4, off sc0
\tglobal_atomic_add_f32 v[2:3], v4, off
\tbuffer_atomic_pk_add_bf16 v1, v2, s[0:3], 0 offen
\ts_endpgm
"""


def test_sass_is_counted():
    counts = resources.count_sass(resources.sass_instructions(SASS))
    assert counts == {
        "spills": 2, "instructions": 11, "dots": {"HGMMA": 1, "UTCMMA": 1}, "atomics": 3,
        "float_atomics": 2, "traps": 1,
    }  # fmt: skip


def test_gcn_is_counted():
    assert resources.count_gcn(GCN) == {
        "instructions": 5, "dots": {"MFMA": 1}, "atomics": 3, "float_atomics": 2, "traps": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "columns", "blocks"),
    [
        ("sm_90", 128, 8, 0, 0, 2),
        ("sm_90", 129, 8, 0, 0, 1),  # registers are given out eight at a time
        ("sm_90", 32, 4, 232448, 0, 1),  # 227 KiB is the most that a block may have
        ("sm_90", 32, 4, 232449, 0, 0),
        ("sm_80", 32, 4, 166913, 0, 0),
        ("sm_100", 32, 4, 0, 256, 2),
        ("sm_100", 32, 4, 0, 768, 0),
        ("gfx942", 128, 8, 32768, 0, 2),
        ("gfx942", 128, 8, 65537, 0, 0),
    ],
)
def test_blocks_per_sm(target, registers, warps, shared, columns, blocks):
    assert resources.blocks_per_sm(target, registers, warps, shared, columns) == blocks


def test_the_same_figures_are_no_regression():
    assert checks.regressions(ROW, ROW) == []


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("registers", 168, "registers 154 -> 168"),
        ("shared", 131072, "shared 98304 -> 131072"),
        ("blocks", 0, "blocks per SM 1 -> 0"),
    ],
)
def test_a_worse_figure_is_a_regression(name, value, text):
    assert checks.regressions(ROW | {"ours": ROW["ours"] | {name: value}}, ROW) == [text]


def test_another_launch_is_a_regression():
    assert checks.regressions(ROW | {"launches": 3}, ROW) == ["launches 2 -> 3"]


def test_a_row_that_nobody_has_committed_is_reported():
    assert "not in the committed table" in checks.regressions(ROW, None)[0]


def second_launch(**changes) -> list[str]:
    """Problems on sm_90 of a bf16 GEMM whose plain counterpart is FINE."""
    given = {"y_ptr": torch.empty(1, dtype=torch.bfloat16), "total_ptr": None, "BLOCK_M": 128}
    ours = dataclasses.replace(FINE, **changes)
    return checks.kernel_problems(Launch(None, given), "sm_90", ours, FINE)


def test_a_second_launch_may_take_twenty_registers_more_than_the_plain_gemm():
    assert second_launch(registers=174) == []
    assert second_launch(registers=175) == ["175 registers, plain 154"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 2}, "2 spills"),
        ({"blocks": 0}, "0 blocks per SM, plain 1"),
        ({"dots": {"HGMMA": 4, "HMMA": 8}}, "not all wgmma"),
        ({"dots": {}}, "missing"),
        ({"traps": 1}, "1 traps"),
        ({"traps": 4, "tensor_columns": 256}, "4 traps"),
        ({"tensor_columns": 768}, "768 columns of tensor memory"),
    ],
)
def test_a_figure_beyond_its_limit_is_a_problem(changes, problem):
    assert any(problem in text for text in second_launch(**changes))


def test_traps_around_tensor_memory_are_the_compilers_own():
    assert second_launch(traps=3, tensor_columns=256) == []


FAULTS = {
    "sound": None,
    "spilling_tile": "spills",
    "no_wgmma": "not all wgmma",
    "does_not_fit": "no block fits",
    "empty_kernel": "an empty kernel",
    "float_atomic": "float atomics",
    "float_atomic_amd": "float atomics",
    "integer_atomic": "atomics in a kernel without flags",
    "three_launches": "3 launches, at most 1",
    "does_not_compile": "CompileTimeAssertionFailure",
    "kernel_without_case": "shrink_gate: no case compiles it",
}


@pytest.fixture(scope="module")
def verdicts():
    """What the gate says of each fault, compiled without the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.static_faults"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(verdicts, fault):
    problems, expected = verdicts[fault], FAULTS[fault]
    if expected is None:
        assert problems == []
    else:
        assert any(expected in problem for problem in problems), problems
