"""The compiled kernels, on a GPU or executed from their TTIR by ttsem (`make test-ttir`).

Every call names the Triton backend and is seen to launch: under ttsem the tensors are really on the
CPU, where "auto" would quietly take eager. Outputs and workspaces start as NaN.
"""

import contextlib

import pytest
import torch

from mogu_kernels import checks, launch, ops
from mogu_kernels.router import split_gate_weight
from mogu_kernels.tuning import TileConfig
from tests import cases, oracle, red_zones

pytestmark = pytest.mark.gpu
all_pairs = pytest.mark.parametrize(("shape", "kernel"), cases.PAIRS)
all_kernels = pytest.mark.parametrize("kernel", cases.KERNELS)
all_dtypes = pytest.mark.parametrize("dtype", cases.DTYPES)
full_and_half = pytest.mark.parametrize("dtype", ["f32", "bf16"])
LAUNCHES = {
    "fused": ["fused_kernel"],
    "fused_tall": ["fused_kernel"],
    "two_launch": ["shrink_gate_kernel", "gated_linear_kernel"],
    "persistent": ["shrink_gate_kernel", "persistent_linear_kernel"],
    "one_launch": ["one_launch_kernel"],
}
PLAIN = "m17-n136-k72-e2-r8-softmax"  # every kernel takes it
SEVERAL = pytest.mark.parametrize("shape", [PLAIN, "m33-n40-k129-e3-r5-routed", cases.TOO_WIDE])
MLP_TILES = TileConfig("two_launch", 16, 32, 32, GROUP_M=2)


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
    logits = add_products(p.x, p.gate_weight) + p.gate_bias
    gates = logits.softmax(1) if p.gate == "softmax" else logits.sigmoid()
    total = gates.sum(1)
    if p.routed is not None:
        total = torch.where(p.routed, total, 1)
        gates = gates * p.routed[:, None]
    y = add_products(p.x, p.weight)
    y = total[:, None] * (y if p.bias is None else y + p.bias)
    for e, s in enumerate(p.scaling):
        shrunk = s * gates[:, e, None] * add_products(p.x, p.lora_A[e])
        y = add_products(shrunk, p.lora_B[e], y)
    return y


def add_products(x, weight, y=0.0):
    """Y + x @ weight.T, from the first column to the last."""
    for k in range(x.shape[1]):
        y = y + x[:, k, None] * weight[:, k]
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


def run(projection, kernel, expected=None, **kwargs):
    """The compiled op with the tiles of a named kernel; results back on the CPU."""
    operands = on_device(projection).operands()
    if kernel == "persistent":
        operands["lora_B"] = cases.side_by_side(operands["lora_B"])
    with counted() as launched:
        result = ops.mogu_linear(
            **operands, backend="triton", config=cases.KERNELS[kernel], **kwargs
        )
    assert launched == (expected or LAUNCHES[kernel])
    return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()


def changed(projection, **operands):
    """A copy of the projection with some operands replaced."""
    return oracle.Projection(**{**projection.operands(), **operands})


def masked(dtype):
    """A projection that every kernel takes, with a third of its rows unrouted."""
    projection = cases.projection(PLAIN, dtype)
    return changed(projection, routed=torch.arange(len(projection.x)) % 3 != 0)


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
@full_and_half
def test_asking_for_gates_changes_no_bit_of_y(kernel, dtype):
    projection = masked(dtype)
    y, _ = run(projection, kernel, return_gates=True)
    assert torch.equal(y, run(projection, kernel))


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


@pytest.mark.parametrize("kernel", [name for name in cases.KERNELS if name != "persistent"])
@full_and_half
def test_any_strides_give_the_same_bits(kernel, dtype):
    projection = masked(dtype)
    strided = red_zones.strided(projection)
    assert strided.x.stride() != projection.x.stride()
    assert torch.equal(run(projection, kernel), run(strided, kernel))


@full_and_half
def test_strides_that_no_descriptor_takes_go_to_the_pointer_kernel(dtype):
    projection = masked(dtype)
    y = run(red_zones.strided(projection), "persistent", expected=LAUNCHES["two_launch"])
    oracle.assert_matches(actual=y, projection=projection)


@pytest.mark.parametrize("kernel", [name for name in cases.KERNELS if name != "persistent"])
def test_expanded_tokens_work(kernel):
    projection = cases.projection(PLAIN, "f32")
    projection = changed(projection, x=projection.x[:1].expand(9, -1))
    oracle.assert_matches(actual=run(projection, kernel), projection=projection)


@all_kernels
@full_and_half
def test_nan_around_the_operands_is_never_read(kernel, dtype):
    projection = masked(dtype)
    guarded = red_zones.guarded(on_device(projection))
    y, gates = run(guarded, kernel, return_gates=True)
    oracle.assert_matches(actual=y, projection=projection, gates=gates)


@all_kernels
@all_dtypes
def test_unrouted_rows_are_the_plain_projection_to_the_bit(kernel, dtype):
    projection = masked(dtype)
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
@full_and_half
def test_the_mask_of_other_rows_changes_no_bit(kernel, dtype):
    projection = masked(dtype)
    routed = projection.routed
    flipped = ~routed
    flipped[7] = routed[7]
    y = run(projection, kernel)
    assert torch.equal(y[7], run(changed(projection, routed=flipped), kernel)[7])
    everyone = run(changed(projection, routed=torch.ones_like(routed)), kernel)
    assert torch.equal(everyone, run(changed(projection, routed=None), kernel))
    assert torch.equal(everyone[routed], y[routed])


@all_kernels
@full_and_half
def test_a_row_has_the_same_bits_alone_anywhere_and_in_any_company(kernel, dtype):
    projection = masked(dtype)
    whole = run(projection, kernel)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(1))

    def part(rows):
        rows_of = {"x": projection.x[rows].clone(), "routed": projection.routed[rows]}
        return run(changed(projection, **rows_of), kernel)

    assert torch.equal(part(order), whole[order])
    for row in (0, 16):
        assert torch.equal(part(slice(row, row + 1))[0], whole[row])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, under ttsem
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@all_kernels
@full_and_half
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
@full_and_half
def test_zero_adapters_leave_gated_base(kernel, dtype):
    projection = masked(dtype)
    # sigmoid: gates that sum to one would leave the plain projection, and nothing to compare
    zero = changed(projection, lora_B=torch.zeros_like(projection.lora_B), gate="sigmoid")
    without_A = changed(zero, lora_A=torch.zeros_like(projection.lora_A))
    y = run(zero, kernel)
    assert torch.equal(y, run(without_A, kernel))
    oracle.assert_matches(actual=y, projection=zero)


@full_and_half
def test_flags_are_left_ready_for_the_next_launch(dtype):
    projection = masked(dtype)
    launch._FLAGS.clear()
    first = run(projection, "one_launch")
    assert launch._FLAGS
    assert not any(flags.any() for flags in launch._FLAGS.values())
    assert torch.equal(first, run(projection, "one_launch"))


@all_kernels
def test_a_launch_without_rows_of_output_is_none(kernel):
    projection = oracle.random(M=5, N=0, K=16, E=2, rank=8, dtype=torch.float32)
    with counted() as launched:
        y = ops.mogu_linear(
            **on_device(projection).operands(), backend="triton", config=cases.KERNELS[kernel]
        )
    assert y.shape == (5, 0)
    assert set(launched) <= {"shrink_gate_kernel"}


@all_dtypes
@pytest.mark.filterwarnings("ignore:no tiles were measured")
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


@all_dtypes
@SEVERAL
def test_projections_that_share_one_shrink_match_fp64(shape, dtype):
    first = cases.projection(shape, dtype)
    group = [first, cases.twin(first, 1), cases.twin(first, 2)]
    there = [on_device(p) for p in group]
    with counted() as launched:
        shrunk, total, gates = ops.shrink_gate(
            there[0].x,
            *([getattr(p, name) for p in there] for name in ("lora_A", "gate_weight", "gate_bias")),
            scaling=first.scaling,
            gate=first.gate,
            routed=there[0].routed,
            backend="triton",
            return_gates=True,
        )
        assert launched == ["shrink_gate_kernel"]
        for p, (projection, device) in enumerate(zip(group, there, strict=True)):
            y = ops.gated_linear(
                device.x,
                device.weight,
                device.bias,
                shrunk[p],
                total[p],
                device.lora_B,
                backend="triton",
                config=cases.TWO_LAUNCH,
            )
            oracle.assert_matches(actual=y.cpu(), projection=projection, gates=gates[p].cpu())


@all_dtypes
@SEVERAL
def test_gate_and_expand_around_a_foreign_base_is_exact_on_integers(shape, dtype):
    projection = cases.projection(shape, dtype, make=oracle.integers)
    there = on_device(projection)
    with counted() as launched:
        shrunk, total = ops.shrink_gate(
            there.x,
            there.lora_A,
            there.gate_weight,
            there.gate_bias,
            scaling=projection.scaling,
            gate=projection.gate,
            routed=there.routed,
            backend="triton",
        )
        y = (projection.x @ projection.weight.T).to("cuda")
        ops.gated_expand_(y, shrunk, total, there.lora_B, there.bias, backend="triton")
    assert launched == ["shrink_gate_kernel", "gated_expand_kernel"]
    oracle.assert_exact(actual=y.cpu(), projection=projection)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, under ttsem
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@all_dtypes
@SEVERAL
def test_a_gated_mlp_matches_fp64(shape, dtype, activation):
    gate_proj = cases.projection(shape, dtype)
    up_proj = cases.twin(gate_proj, 1)
    there = [on_device(p) for p in (gate_proj, up_proj)]
    names = ("weight", "bias", "lora_A", "lora_B", "gate_weight", "gate_bias")
    pairs = {name: [getattr(p, name) for p in there] for name in names}
    if gate_proj.bias is None:
        pairs["bias"] = None
    with counted() as launched:
        y = ops.gated_mlp(
            there[0].x,
            **pairs,
            scaling=gate_proj.scaling,
            gate=gate_proj.gate,
            routed=there[0].routed,
            activation=activation,
            backend="triton",
            config=MLP_TILES,
        )
    assert launched == ["shrink_gate_kernel", "gated_mlp_kernel"]
    oracle.assert_mlp_matches(
        actual=y.cpu(), gate_proj=gate_proj, up_proj=up_proj, activation=activation
    )
