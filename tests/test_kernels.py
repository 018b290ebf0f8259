"""The Triton kernels against fp64, in the interpreter."""

import pytest
import torch

from mogu_kernels import launch, ops
from mogu_kernels.router import split_gate_weight
from tests import cases, oracle, red_zones

all_pairs = pytest.mark.parametrize(("shape", "kernel"), cases.PAIRS)
all_kernels = pytest.mark.parametrize("kernel", cases.KERNELS)
all_dtypes = pytest.mark.parametrize("dtype", cases.DTYPES)


def run(projection, kernel, **kwargs):
    """The op on Triton, with the tiles of a named kernel."""
    operands = projection.operands()
    if kernel == "persistent":
        operands["lora_B"] = cases.side_by_side(operands["lora_B"])
    return ops.mogu_linear(**operands, backend="triton", config=cases.KERNELS[kernel], **kwargs)


@all_dtypes
@all_pairs
def test_random_operands_match_fp64_within_three_gates(shape, kernel, dtype):
    projection = cases.projection(shape, dtype)
    with red_zones.around_outputs():
        y, gates = run(red_zones.guarded(projection), kernel, return_gates=True)
    oracle.assert_matches(actual=y, projection=projection, gates=gates)


@all_dtypes
@all_pairs
def test_integers_are_bitwise_exact(shape, kernel, dtype):
    projection = cases.projection(shape, dtype, make=oracle.integers)
    oracle.assert_exact(actual=run(projection, kernel), projection=projection)


@all_kernels
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_split_router_is_as_good_as_the_fp32_one(kernel, dtype):
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", dtype)
    y, gates = run(projection, kernel, return_gates=True)
    split = split_gate_weight(projection.gate_weight, projection.x.dtype)
    projection.gate_weight = split
    y_split, gates_split = run(projection, kernel, return_gates=True)
    assert torch.equal(y, y_split)
    assert torch.equal(gates, gates_split)


@all_kernels
@all_dtypes
def test_any_strides_give_the_same_bits(kernel, dtype):
    projection = cases.projection("m33-n40-k129-e3-r5-routed", dtype)
    strided = red_zones.strided(projection)
    assert torch.equal(run(projection, kernel), run(strided, kernel))


@all_kernels
def test_expanded_tokens_work(kernel):
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", "f32")
    projection.x = projection.x[:1].expand(9, -1)
    y = run(projection, kernel)
    oracle.assert_matches(actual=y, projection=projection)


@all_kernels
@all_dtypes
def test_unrouted_rows_are_the_plain_projection_to_the_bit(kernel, dtype):
    projection = cases.projection("m37-n72-k48-e1-r1-routed", dtype)
    y = run(projection, kernel)
    plain = oracle.Projection(**projection.operands())
    plain.routed = torch.zeros(len(plain.x), dtype=torch.bool)
    plain.lora_A, plain.lora_B = plain.lora_A * 0, plain.lora_B * 0
    assert torch.equal(y[~projection.routed], run(plain, kernel)[~projection.routed])
    assert not torch.equal(y[projection.routed], run(plain, kernel)[projection.routed])


@all_kernels
def test_a_row_does_not_depend_on_its_batch(kernel):
    projection = cases.projection("m33-n40-k129-e3-r5-routed", "bf16")
    whole = run(projection, kernel)
    for row in (0, 16, 32):
        alone = oracle.Projection(**projection.operands())
        alone.x, alone.routed = projection.x[row : row + 1], projection.routed[row : row + 1]
        assert torch.equal(run(alone, kernel)[0], whole[row])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, on the NaN row
@all_kernels
def test_nan_stays_in_its_row(kernel):
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", "bf16")
    clean = run(projection, kernel)
    projection.x[3, 5] = float("nan")
    dirty = run(projection, kernel)
    others = torch.arange(17) != 3
    assert dirty[3].isnan().all()
    assert torch.equal(dirty[others], clean[others])


@all_kernels
@pytest.mark.parametrize(("M", "N"), [(0, 65), (5, 0)])
def test_empty_outputs_work(kernel, M, N):
    projection = oracle.random(M=M, N=N, K=16, E=2, rank=8, dtype=torch.float32)
    y, gates = run(projection, kernel, return_gates=True)
    assert y.shape == (M, N)
    assert gates.shape == (M, 2)


def test_ranks_too_wide_for_one_launch_are_refused():
    with pytest.raises(ValueError, match=r"136 rank columns.*two_launch"):
        run(cases.projection(cases.TOO_WIDE, "f32"), "fused")


@all_kernels
def test_saturated_gates_select(kernel):
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", "f32")
    projection.gate_bias = torch.tensor([300.0, -300.0])
    y, gates = run(projection, kernel, return_gates=True)
    assert torch.equal(gates, torch.tensor([[1.0, 0.0]]).expand(17, 2))
    oracle.assert_matches(actual=y, projection=projection)


@all_kernels
def test_swapping_experts_with_their_gates_changes_nothing(kernel):
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", "f32")
    swapped = oracle.Projection(**projection.operands())
    for name in ("lora_A", "lora_B", "gate_weight", "gate_bias"):
        setattr(swapped, name, getattr(projection, name).flip(0))
    swapped.scaling = projection.scaling[::-1]
    torch.testing.assert_close(run(projection, kernel), run(swapped, kernel), rtol=1e-5, atol=1e-5)


@all_kernels
def test_padding_the_rank_with_zeros_changes_nothing(kernel):
    projection = cases.projection("m33-n40-k129-e3-r5-routed", "f32")
    padded = oracle.Projection(**projection.operands())
    padded.lora_A = torch.nn.functional.pad(projection.lora_A, (0, 0, 0, 2))
    padded.lora_B = torch.nn.functional.pad(projection.lora_B, (0, 2))
    torch.testing.assert_close(run(projection, kernel), run(padded, kernel), rtol=1e-6, atol=1e-6)


@all_kernels
def test_zero_adapters_leave_gated_base(kernel):
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", "f32")
    projection.gate, projection.lora_B = "sigmoid", torch.zeros_like(projection.lora_B)
    y, gates = run(projection, kernel, return_gates=True)
    base = torch.nn.functional.linear(projection.x, projection.weight, projection.bias)
    torch.testing.assert_close(y, gates.sum(1, keepdim=True) * base)


def test_every_config_runs_the_kernel_it_names(monkeypatch):
    names, original = [], launch._run

    def listen(kernel, grid, **arguments):
        names.append(kernel.__name__)
        original(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "_run", listen)
    for kernel in cases.KERNELS:
        run(cases.projection("m17-n136-k72-e2-r8-softmax", "f32"), kernel)
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", "f32")
    ops.mogu_linear(**projection.operands(), backend="triton", config=cases.PERSISTENT)
    assert names == [
        "fused_kernel",
        "fused_kernel",
        "shrink_gate_kernel",
        "gated_linear_kernel",
        "shrink_gate_kernel",
        "persistent_linear_kernel",
        "one_launch_kernel",
        "shrink_gate_kernel",  # experts that do not lie side by side: no descriptor, same tiles
        "gated_linear_kernel",
    ]


@all_kernels
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_the_error_is_that_of_one_rounding(kernel, dtype):
    """Budget 4, with experts of a trained size: lora_B of 0.05 beside a base of 1."""
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", dtype)
    dtype = projection.x.dtype
    projection.lora_B = (projection.lora_B.float() * 8**0.5 * 0.05).to(dtype)
    ref = oracle.truth(projection)
    rounded = (ref.to(dtype).double() - ref).square().mean().sqrt()
    error = (run(projection, kernel).double() - ref).square().mean().sqrt()
    assert error <= 1.05 * rounded, f"{float(error / rounded):.3f} times one rounding"


def test_the_unpatched_interpreter_still_has_no_bf16():
    """Should this fail, tests/bf16_interpreter.py can go."""
    import subprocess
    import sys

    program = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "import torch\n"
        "from tests import cases, oracle\n"
        "from mogu_kernels import ops\n"
        "p = cases.projection('m17-n136-k72-e2-r8-softmax', 'bf16')\n"
        "y = ops.mogu_linear(**p.operands(), backend='triton', config=cases.FUSED)\n"
        "oracle.assert_matches(actual=y, projection=p)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
