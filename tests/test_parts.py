"""The projection in two steps, around any base, and the gated MLP, against fp64."""

import pytest
import torch

from mogu_kernels import ops
from mogu_kernels.tuning import TileConfig
from tests import cases, oracle, red_zones

MLP_TILES = TileConfig("two_launch", 16, 32, 32, GROUP_M=2)
OPERANDS = ("weight", "bias", "lora_A", "lora_B", "gate_weight", "gate_bias")

both_backends = pytest.mark.parametrize("backend", ["triton", "eager"])
all_backends = pytest.mark.parametrize("backend", ["triton", cases.CPP, "eager"])
all_dtypes = pytest.mark.parametrize("dtype", cases.DTYPES)
all_shapes = pytest.mark.parametrize("shape", cases.SHAPES)


def shrink(*projections, **kwargs):
    """`shrink_gate` of projections that read the same x."""
    first = projections[0]
    lists = (
        [getattr(p, name) for p in projections] for name in ("lora_A", "gate_weight", "gate_bias")
    )
    options = {"scaling": first.scaling, "gate": first.gate, "routed": first.routed}
    return ops.shrink_gate(first.x, *lists, **options | kwargs)


def mlp(gate_proj, up_proj, activation="silu", **kwargs):
    """`gated_mlp` of two projections."""
    pairs = {name: [getattr(gate_proj, name), getattr(up_proj, name)] for name in OPERANDS}
    if gate_proj.bias is None:
        pairs["bias"] = None
    options = {"scaling": gate_proj.scaling, "gate": gate_proj.gate, "routed": gate_proj.routed}
    return ops.gated_mlp(gate_proj.x, **pairs, activation=activation, **options | kwargs)


@all_backends
@all_dtypes
@all_shapes
def test_projections_that_share_one_shrink_match_fp64(shape, dtype, backend):
    first = cases.projection(shape, dtype)
    group = [first, cases.twin(first, 1), cases.twin(first, 2)]
    with red_zones.around_outputs():
        shrunk, total, gates = shrink(*group, backend=backend, return_gates=True)
        for p, projection in enumerate(group):
            y = ops.gated_linear(
                projection.x,
                projection.weight,
                projection.bias,
                shrunk[p],
                total[p],
                projection.lora_B,
                backend=backend,
                config=cases.TWO_LAUNCH,
            )
            oracle.assert_matches(actual=y, projection=projection, gates=gates[p])


@all_dtypes
def test_a_shared_shrink_has_the_bits_of_one_for_each(dtype):
    first = cases.projection("m33-n40-k129-e3-r5-routed", dtype)
    other = cases.twin(first, 1)
    other.lora_A = other.lora_A.transpose(1, 2).contiguous().transpose(1, 2)  # other strides
    together = shrink(first, other, backend="triton", return_gates=True)
    for p, projection in enumerate((first, other)):
        alone = ops.shrink_gate(
            projection.x,
            projection.lora_A,
            projection.gate_weight,
            projection.gate_bias,
            scaling=projection.scaling,
            gate=projection.gate,
            routed=projection.routed,
            backend="triton",
            return_gates=True,
        )
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one, all_of_them[p])


@all_backends
@all_dtypes
@all_shapes
def test_gate_and_expand_around_a_foreign_base_round_once(shape, dtype, backend):
    projection = cases.projection(shape, dtype)
    shrunk, total = shrink(projection, backend=backend)
    base = projection.x @ projection.weight.T
    y = red_zones.poisoned(base.shape, base.dtype).copy_(base)
    out = ops.gated_expand_(
        y, shrunk[0], total[0], projection.lora_B, projection.bias, backend=backend
    )
    assert out is y
    assert red_zones.intact(y)
    oracle.assert_expanded(
        actual=y,
        base=base,
        shrunk=shrunk[0],
        total=total[0],
        lora_B=projection.lora_B,
        bias=projection.bias,
    )


@all_dtypes
def test_a_foreign_base_with_exact_integers_is_exact(dtype):
    projection = cases.projection("m35-n67-k33-e8-r7", dtype, make=oracle.integers)
    shrunk, total = shrink(projection, backend="triton")
    y = torch.nn.functional.linear(projection.x, projection.weight)
    ops.gated_expand_(y, shrunk[0], total[0], projection.lora_B, projection.bias, backend="triton")
    oracle.assert_exact(actual=y, projection=projection)


@all_dtypes
def test_a_foreign_base_keeps_its_bits_in_unrouted_rows(dtype):
    projection = cases.projection("m33-n40-k129-e3-r5-routed", dtype)
    shrunk, total = shrink(projection, backend="triton")
    base = projection.x @ projection.weight.T
    y = ops.gated_expand_(base.clone(), shrunk[0], total[0], projection.lora_B, backend="triton")
    assert torch.equal(y[~projection.routed], base[~projection.routed])
    assert not torch.equal(y[projection.routed], base[projection.routed])


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's: z / (1 + inf) is meant
@both_backends
@all_dtypes
@all_shapes
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_a_gated_mlp_matches_fp64(shape, dtype, backend, activation):
    gate_proj = cases.projection(shape, dtype)
    up_proj = cases.twin(gate_proj, 1)
    with red_zones.around_outputs():
        y, gates = mlp(
            red_zones.guarded(gate_proj),
            red_zones.guarded(up_proj),
            activation,
            backend=backend,
            config=MLP_TILES,
            return_gates=True,
        )
    oracle.assert_mlp_matches(actual=y, gate_proj=gate_proj, up_proj=up_proj, activation=activation)
    for j, projection in enumerate((gate_proj, up_proj)):
        true = oracle.true_gates(projection)
        torch.testing.assert_close(gates[j].double(), true, rtol=0, atol=2e-5)


@all_dtypes
def test_any_strides_of_a_gated_mlp_give_the_same_bits(dtype):
    gate_proj = cases.projection("m33-n40-k129-e3-r5-routed", dtype)
    up_proj = cases.twin(gate_proj, 1)
    y = mlp(gate_proj, up_proj, backend="triton", config=MLP_TILES)
    for pair in (
        (red_zones.strided(gate_proj), red_zones.strided(up_proj)),
        (gate_proj, red_zones.strided(up_proj)),
    ):
        assert torch.equal(y, mlp(*pair, backend="triton", config=MLP_TILES))


@all_dtypes
def test_unrouted_rows_of_a_gated_mlp_are_the_plain_one_to_the_bit(dtype):
    gate_proj = cases.projection("m33-n40-k129-e3-r5-routed", dtype)
    up_proj = cases.twin(gate_proj, 1)
    routed = gate_proj.routed
    y = mlp(gate_proj, up_proj, backend="triton", config=MLP_TILES)
    for projection in (gate_proj, up_proj):
        projection.routed = torch.zeros_like(routed)
        projection.lora_A, projection.lora_B = projection.lora_A * 0, projection.lora_B * 0
    plain = mlp(gate_proj, up_proj, backend="triton", config=MLP_TILES)
    assert torch.equal(y[~routed], plain[~routed])
    assert not torch.equal(y[routed], plain[routed])


def test_a_row_of_a_gated_mlp_does_not_depend_on_its_batch():
    gate_proj = cases.projection("m33-n40-k129-e3-r5-routed", "bf16")
    up_proj = cases.twin(gate_proj, 1)
    whole = mlp(gate_proj, up_proj, backend="triton", config=MLP_TILES)
    for row in (0, 16, 32):
        alone = [oracle.Projection(**p.operands()) for p in (gate_proj, up_proj)]
        for projection in alone:
            projection.x = projection.x[row : row + 1]
            projection.routed = projection.routed[row : row + 1]
        assert torch.equal(mlp(*alone, backend="triton", config=MLP_TILES)[0], whole[row])


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("routed", [False, True])
def test_gradients_of_a_gated_mlp_pass_gradcheck(activation, routed):
    sizes = {"M": 4, "N": 5, "K": 6, "E": 2, "rank": 3, "dtype": torch.float64}
    gate_proj = oracle.random(**sizes, routed=routed).double()
    up_proj = cases.twin(gate_proj, 1).double()
    tensors = [gate_proj.x, *(getattr(p, n) for n in OPERANDS for p in (gate_proj, up_proj))]

    def function(x, *flat):
        pairs = {name: flat[2 * i : 2 * i + 2] for i, name in enumerate(OPERANDS)}
        return ops.gated_mlp(
            x,
            **pairs,
            scaling=gate_proj.scaling,
            activation=activation,
            routed=gate_proj.routed,
            return_gates=True,
        )

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors])


def test_gradients_flow_through_the_two_steps():
    projection = oracle.random(M=4, N=5, K=6, E=2, rank=3, dtype=torch.float64).double()
    names = ("x", *OPERANDS)
    tensors = [getattr(projection, name).requires_grad_() for name in names]

    def in_two_steps(projection):
        shrunk, total = shrink(projection)
        base = torch.nn.functional.linear(projection.x, projection.weight)
        return ops.gated_expand_(base, shrunk[0], total[0], projection.lora_B, projection.bias)

    expected = torch.autograd.grad(oracle.truth(projection).square().sum(), tensors)
    grads = torch.autograd.grad(in_two_steps(projection).square().sum(), tensors)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-10)


@all_backends
def test_opcheck_passes(backend):
    p = oracle.random(M=5, N=7, K=9, E=2, rank=3, dtype=torch.float32, routed=True)
    q = cases.twin(p, 1)
    options = (p.scaling, p.gate)
    lists = ([p.lora_A, q.lora_A], [p.gate_weight, q.gate_weight], [p.gate_bias, q.gate_bias])
    shrunk, total, _ = torch.ops.mogu.shrink_gate(p.x, *lists, *options, p.routed, True, backend)
    checks = {
        "shrink_gate": (p.x, *lists, *options, p.routed, True, backend),
        "gated_linear": (p.x, p.weight, p.bias, shrunk[0], total[0], p.lora_B, backend, ""),
        "gated_expand_": (torch.ones(5, 7), shrunk[0], total[0], p.lora_B, p.bias, backend),
        "gated_mlp": (
            p.x.clone().requires_grad_(),
            *([getattr(p, n).clone().requires_grad_(), getattr(q, n)] for n in OPERANDS),
            *options,
            "silu",
            p.routed,
            True,
            backend,
            "",
        ),
    }
    for name, args in checks.items():
        torch.library.opcheck(getattr(torch.ops.mogu, name).default, args)


def test_a_gated_mlp_compiles_whole_with_dynamic_tokens():
    gate_proj = cases.projection("m17-n136-k72-e2-r8-softmax", "f32")
    up_proj = cases.twin(gate_proj, 1)
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def function(x):
        gate_proj.x = x
        return mlp(gate_proj, up_proj)

    whole = gate_proj.x
    for tokens in (17, 5):
        y = function(whole[:tokens].clone())
        gate_proj.x = whole[:tokens]
        torch.testing.assert_close(y, mlp(gate_proj, up_proj))


@both_backends
def test_empty_batches_work(backend):
    projection = oracle.random(M=0, N=7, K=9, E=2, rank=3, dtype=torch.float32)
    shrunk, total = shrink(projection, projection, backend=backend)
    assert (shrunk.shape, total.shape) == ((2, 0, 6), (2, 0))
    y = torch.empty(0, 7)
    ops.gated_expand_(y, shrunk[0], total[0], projection.lora_B, backend=backend)
    assert mlp(projection, projection, backend=backend).shape == (0, 7)


def parts(**changes):
    """Good operands of the parts, some changed."""
    p = oracle.random(M=3, N=7, K=9, E=2, rank=3, dtype=torch.float32)
    shrunk, total = shrink(p)
    return {
        "y": torch.ones(3, 7),
        "shrunk": shrunk[0],
        "total": total[0],
        "lora_B": p.lora_B,
    } | changes


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"y": torch.ones(3)}, ValueError, r"\[3\]: flatten it"),
        ({"y": torch.ones(4, 7)}, ValueError, r"shrunk is \[3, 6\], but 4 tokens"),
        ({"y": torch.ones(3, 8)}, ValueError, r"lora_B is \[2, 7, 3\], but y is \[3, 8\]"),
        ({"shrunk": torch.ones(3, 5)}, ValueError, r"shrunk is \[3, 5\].*\[3, 6\]"),
        ({"shrunk": torch.ones(3, 6).half()}, TypeError, "shrunk is torch.float16"),
        ({"total": torch.ones(4)}, ValueError, r"total is \[4\].*3 tokens"),
        ({"total": torch.ones(3).half()}, TypeError, "total is torch.float16"),
        ({"lora_B": torch.ones(7, 6)}, ValueError, r"lora_B is \[7, 6\]"),
        ({"bias": torch.ones(6)}, ValueError, r"bias is \[6\].*\[7\]"),
        ({"backend": "cuda"}, ValueError, "backend='cuda'"),
    ],
)
def test_bad_operands_of_gated_expand_are_named(changes, error, match):
    with pytest.raises(error, match=match):
        ops.gated_expand_(**parts(**changes))


def test_bad_groups_and_mlps_are_named():
    p = oracle.random(M=3, N=7, K=9, E=2, rank=3, dtype=torch.float32)
    wide = oracle.random(M=3, N=7, K=9, E=2, rank=4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\[2, 3, 9\], \[2, 4, 9\].*share a launch"):
        shrink(p, wide)
    with pytest.raises(ValueError, match="1 lora_A, 2 gate_weight, 1 gate_bias"):
        ops.shrink_gate(p.x, [p.lora_A], [p.gate_weight] * 2, [p.gate_bias], scaling=1.0)
    with pytest.raises(ValueError, match=r"lora_A is \[2, 3, 9\] in gate_proj but \[2, 4, 9\]"):
        mlp(p, wide)
    with pytest.raises(ValueError, match=r"activation='relu'.*silu"):
        mlp(p, p, "relu")
    with pytest.raises(ValueError, match=r"fused:.*gated MLP"):
        mlp(p, p, config=cases.FUSED)
    with pytest.raises(ValueError, match="weight has 1 entries"):
        ops.gated_mlp(p.x, [p.weight], None, [], [], [], [], scaling=1.0)
    shrunk, total = shrink(p)
    with pytest.raises(ValueError, match="no second launch"):
        ops.gated_linear(
            p.x, p.weight, None, shrunk[0], total[0], p.lora_B, config=cases.ONE_LAUNCH
        )
