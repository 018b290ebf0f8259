"""The compiled kernels, on a GPU or executed from their TTIR by ttsem (`make test-ttir`).

Every call names the Triton backend and is seen to launch: under ttsem the tensors are really on the
CPU, where "auto" would quietly take eager. Outputs and workspaces start as NaN.
"""

import contextlib

import pytest
import torch

from mogu_kernels import checks, launch, ops
from mogu_kernels.router import split_gate_weight
from tests import cases, oracle, red_zones

pytestmark = pytest.mark.gpu
all_pairs = pytest.mark.parametrize(("shape", "kernel"), cases.PAIRS)
all_kernels = pytest.mark.parametrize("kernel", cases.KERNELS)
all_dtypes = pytest.mark.parametrize("dtype", cases.DTYPES)
half_and_full = pytest.mark.parametrize("dtype", ["f32", "bf16"])
PLAIN, MASKED = "m17-n136-k72-e2-r8-softmax", "m33-n40-k129-e3-r5-routed"


@pytest.fixture(autouse=True)
def compiled():
    """Only compiled kernels count here."""
    if checks.interpreting():
        pytest.skip("kernels are interpreted: set TRITON_INTERPRET=0")


@pytest.fixture(autouse=True)
def nan_in_outputs(monkeypatch):
    """Whatever a kernel leaves unstored is seen."""

    def empty(*shape, dtype, device):
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(launch, "_empty", empty)


@pytest.fixture(autouse=True)
def plain_fp32_adds_in_order(monkeypatch):
    """In fp32 a GPU adds product after product; the CPU adds in blocks, with up to 3.7x less error.

    So the baseline of the oracle's second gate adds in order too, in fp32 only.
    """
    original = oracle.plain_pytorch

    def plain_pytorch(projection):
        in_fp32 = projection.x.dtype == torch.float32
        return sum_in_order(projection) if in_fp32 else original(projection)

    monkeypatch.setattr(oracle, "plain_pytorch", plain_pytorch)


def sum_in_order(p):
    """Y in fp32, one product added at a time: over K, then over the ranks of every expert."""
    total, gates = (part.float() for part in oracle.effective_gates(p))
    y = torch.zeros(len(p.x), len(p.weight))
    for k in range(p.x.shape[1]):
        y += p.x[:, k, None] * p.weight[:, k]
    y = total[:, None] * (y if p.bias is None else y + p.bias)
    for e, s in enumerate(p.scaling):
        shrunk = s * gates[:, e, None] * (p.x @ p.lora_A[e].T)
        for r in range(shrunk.shape[1]):
            y += shrunk[:, r, None] * p.lora_B[e][:, r]
    return y


@contextlib.contextmanager
def counted():
    """The names of the kernels launched inside."""
    names, original = [], launch._run

    def run(kernel, grid, **arguments):
        names.append(kernel.__name__)
        original(kernel, grid, **arguments)

    launch._run = run
    try:
        yield names
    finally:
        launch._run = original


def on_device(projection):
    """The same operands on the GPU, strides kept."""
    return red_zones._mapped(projection, lambda tensor: tensor.to("cuda"))


def run(projection, kernel, **kwargs):
    """The compiled op with the tiles of a named kernel; results back on the CPU."""
    with counted() as launched:
        result = ops.mogu_linear(
            **on_device(projection).operands(),
            backend="triton",
            config=cases.KERNELS[kernel],
            **kwargs,
        )
    assert launched, "nothing was launched"
    return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()


def changed(projection, **operands):
    """A copy of the projection with some operands replaced."""
    return oracle.Projection(**{**projection.operands(), **operands})


@all_dtypes
@all_pairs
def test_random_operands_match_fp64_within_three_gates(shape, kernel, dtype):
    projection = cases.projection(shape, dtype)
    y, gates = run(projection, kernel, return_gates=True)
    oracle.assert_matches(actual=y, projection=projection, gates=gates)


@all_dtypes
@all_pairs
def test_integers_are_bitwise_exact(shape, kernel, dtype):
    projection = cases.projection(shape, dtype, make=oracle.integers)
    oracle.assert_exact(actual=run(projection, kernel), projection=projection)


@all_kernels
@half_and_full
def test_asking_for_gates_changes_no_bit_of_y(kernel, dtype):
    projection = cases.projection(MASKED, dtype)
    y, gates = run(projection, kernel, return_gates=True)
    assert torch.equal(y, run(projection, kernel))
    oracle.assert_matches(actual=y, projection=projection, gates=gates)


@all_kernels
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_router_split_beforehand_gives_the_same_bits(kernel, dtype):
    projection = cases.projection(PLAIN, dtype)
    split = split_gate_weight(projection.gate_weight, projection.x.dtype)
    for ours, beforehand in zip(
        run(projection, kernel, return_gates=True),
        run(changed(projection, gate_weight=split), kernel, return_gates=True),
        strict=True,
    ):
        assert torch.equal(ours, beforehand)


@all_kernels
@half_and_full
def test_any_strides_give_the_same_bits(kernel, dtype):
    projection = cases.projection(MASKED, dtype)
    strided = red_zones.strided(projection)
    assert strided.x.stride() != projection.x.stride()
    assert torch.equal(run(projection, kernel), run(strided, kernel))


@all_kernels
def test_expanded_tokens_work(kernel):
    projection = cases.projection(PLAIN, "f32")
    projection = changed(projection, x=projection.x[:1].expand(9, -1))
    oracle.assert_matches(actual=run(projection, kernel), projection=projection)


@all_kernels
@half_and_full
def test_nan_around_the_operands_is_never_read(kernel, dtype):
    projection = cases.projection(MASKED, dtype)
    guarded = red_zones.guarded(on_device(projection))
    y, gates = run(guarded, kernel, return_gates=True)
    oracle.assert_matches(actual=y, projection=projection, gates=gates)


@all_kernels
@all_dtypes
def test_unrouted_rows_are_the_plain_projection_to_the_bit(kernel, dtype):
    projection = cases.projection("m37-n72-k48-e1-r1-routed", dtype)
    routed = projection.routed
    plain = changed(
        projection,
        routed=torch.zeros_like(routed),
        lora_A=torch.zeros_like(projection.lora_A),
        lora_B=torch.zeros_like(projection.lora_B),
    )
    y, base = run(projection, kernel), run(plain, kernel)
    assert torch.equal(y[~routed], base[~routed])
    assert (y[routed] != base[routed]).any(1).all()


@all_kernels
@half_and_full
def test_the_mask_of_other_rows_changes_no_bit(kernel, dtype):
    projection = cases.projection(MASKED, dtype)
    routed = projection.routed
    flipped = ~routed
    flipped[7] = routed[7]
    y = run(projection, kernel)
    assert torch.equal(y[7], run(changed(projection, routed=flipped), kernel)[7])
    everyone = run(changed(projection, routed=torch.ones_like(routed)), kernel)
    assert torch.equal(everyone, run(changed(projection, routed=None), kernel))
    assert torch.equal(everyone[routed], y[routed])


@all_kernels
@half_and_full
def test_a_row_has_the_same_bits_alone_anywhere_and_in_any_company(kernel, dtype):
    projection = cases.projection(MASKED, dtype)
    whole = run(projection, kernel)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(1))

    def part(rows):
        return run(
            changed(projection, x=projection.x[rows], routed=projection.routed[rows]), kernel
        )

    assert torch.equal(part(order), whole[order])
    for row in (0, 16, 32):
        assert torch.equal(part(slice(row, row + 1))[0], whole[row])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, under ttsem
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@all_kernels
@half_and_full
def test_nan_and_infinity_stay_in_their_row(kernel, dtype, value):
    projection = cases.projection(PLAIN, dtype)
    x = projection.x.clone()
    x[3, 5] = value
    clean, dirty = run(projection, kernel), run(changed(projection, x=x), kernel)
    others = torch.arange(len(x)) != 3
    assert not dirty[3].isfinite().any()
    assert torch.equal(dirty[others], clean[others])


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, under ttsem
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@all_kernels
def test_saturated_gates_select(kernel, gate):
    projection = cases.projection(PLAIN, "f32")
    projection = changed(projection, gate=gate, gate_bias=torch.tensor([300.0, -300.0]))
    y, gates = run(projection, kernel, return_gates=True)
    assert torch.equal(gates, torch.tensor([[1.0, 0.0]]).expand(17, 2))
    oracle.assert_matches(actual=y, projection=projection)


@all_kernels
@half_and_full
def test_zero_adapters_leave_gated_base(kernel, dtype):
    projection = cases.projection(MASKED, dtype)
    zero = changed(projection, lora_B=torch.zeros_like(projection.lora_B))
    without_A = changed(zero, lora_A=torch.zeros_like(projection.lora_A))
    y = run(zero, kernel)
    assert torch.equal(y, run(without_A, kernel))
    oracle.assert_matches(actual=y, projection=zero)


@all_kernels
@pytest.mark.parametrize(("M", "N"), [(0, 65), (5, 0)])
def test_empty_outputs_launch_nothing(kernel, M, N):
    projection = oracle.random(M=M, N=N, K=16, E=2, rank=8, dtype=torch.float32)
    with counted() as launched:
        y = ops.mogu_linear(
            **on_device(projection).operands(), backend="triton", config=cases.KERNELS[kernel]
        )
    assert y.shape == (M, N)
    assert not launched


@all_dtypes
@pytest.mark.parametrize("M", [1, 17, 65])
def test_tiles_chosen_by_the_heuristic_match_fp64(M, dtype):
    projection = oracle.random(
        M=M, N=72, K=40, E=2, rank=8, dtype=cases.DTYPES[dtype], routed=True, seed=M
    )
    with counted() as launched:
        y, gates = ops.mogu_linear(
            **on_device(projection).operands(), backend="triton", return_gates=True
        )
    assert launched
    oracle.assert_matches(actual=y.cpu(), projection=projection, gates=gates.cpu())
