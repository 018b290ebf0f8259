"""The op as PyTorch sees it: eager on CPU, gradients, opcheck, compile, errors."""

import pytest
import torch
from torch._dynamo.utils import counters

from mogu_kernels import ops
from tests import cases, oracle

OPERANDS = ("x", "weight", "bias", "lora_A", "lora_B", "gate_weight", "gate_bias")


def double(shape="m33-n40-k129-e3-r5-routed", **changes):
    """A small fp64 projection whose operands ask for gradients."""
    M, _, _, E, rank, gate, _, routed = cases.SHAPES[shape]
    sizes = {"M": min(M, 4), "N": 5, "K": 6, "E": E, "rank": min(rank, 3)} | changes
    projection = oracle.random(
        **{"gate": gate, "routed": routed, "dtype": torch.float64} | sizes
    ).double()
    for name in OPERANDS:
        getattr(projection, name).requires_grad_()
    return projection


def call(projection, **kwargs):
    return ops.mogu_linear(**projection.operands(), **kwargs)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_eager_matches_fp64_within_three_gates(shape, dtype):
    projection = cases.projection(shape, dtype)
    y, gates = call(projection, return_gates=True)
    oracle.assert_matches(actual=y, projection=projection, gates=gates)
    integers = cases.projection(shape, dtype, make=oracle.integers)
    oracle.assert_exact(actual=call(integers), projection=integers)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("E", [1, 3])
def test_gradients_of_y_and_gates_pass_gradcheck(gate, routed, E):
    projection = double(gate=gate, routed=routed, E=E)

    def function(*tensors):
        operands = projection.operands() | dict(zip(OPERANDS, tensors, strict=True))
        return ops.mogu_linear(**operands, return_gates=True)

    assert torch.autograd.gradcheck(function, [getattr(projection, n) for n in OPERANDS])


def test_gradients_equal_autograd_of_the_formula():
    projection = double(M=7, N=11, K=13)
    weights = torch.randn(7, 11, dtype=torch.float64)
    tensors = [getattr(projection, name) for name in OPERANDS]
    ours = torch.autograd.grad((call(projection) * weights).sum(), tensors)
    theirs = torch.autograd.grad((oracle.truth(projection) * weights).sum(), tensors)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_a_split_router_has_gradients_in_both_parts():
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", "bf16")
    high = projection.gate_weight.bfloat16()
    low = (projection.gate_weight - high).bfloat16()
    projection.gate_weight = torch.stack([high, low]).requires_grad_()
    call(projection).float().square().sum().backward()
    assert projection.gate_weight.grad.shape == (2, 2, 72)
    assert (projection.gate_weight.grad != 0).any()


@pytest.mark.parametrize("backend", ["eager", cases.CPP, "triton"])
@pytest.mark.parametrize("return_gates", [False, True])
def test_opcheck_passes(backend, return_gates):
    dtype = torch.float32
    projection = oracle.random(M=5, N=7, K=9, E=2, rank=3, dtype=dtype, routed=True)
    for name in OPERANDS:
        getattr(projection, name).requires_grad_()
    config = str(cases.FUSED) if backend == "triton" else ""
    args = (*projection.operands().values(), return_gates, backend, config)
    torch.library.opcheck(torch.ops.mogu.mogu_linear.default, args)


def test_compile_with_dynamic_tokens_makes_one_graph():
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", "f32")
    operands = {k: v for k, v in projection.operands().items() if k != "x"}
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def function(x):
        return ops.mogu_linear(x, **operands)

    for tokens in (17, 5, 9):
        x = projection.x[:tokens].clone()
        assert torch.equal(function(x), ops.mogu_linear(x, **operands))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_keeps_the_router_wide(dtype):
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", "f32")
    with torch.autocast("cpu", dtype):
        y, gates = call(projection, return_gates=True)
    assert y.dtype == dtype
    assert gates.dtype == torch.float32
    assert (y.double() - oracle.truth(projection)).abs().max() < 0.25


def test_scaling_is_one_number_for_all_or_one_each():
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", "f32")
    projection.scaling = 0.5
    one = call(projection)
    projection.scaling = [0.5, 0.5]
    assert torch.equal(one, call(projection))
    projection.scaling = [0.5, 0.25]
    assert not torch.equal(one, call(projection))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"x": torch.ones(3, 4, 9)}, ValueError, r"x \[3, 4, 9\]"),
        ({"x": torch.ones(3, 8)}, ValueError, "in_features=9 but hidden_states has 8"),
        ({"x": torch.ones(3, 9).half()}, TypeError, r"weight is torch.float32 but.*float16"),
        ({"x": torch.ones(3, 9).int()}, TypeError, r"int32"),
        ({"weight": torch.ones(7)}, ValueError, r"weight \[7\]"),
        ({"bias": torch.ones(6)}, ValueError, r"bias is \[6\].*asks for \[7\]"),
        ({"lora_A": torch.ones(2, 3, 8)}, ValueError, r"lora_A is \[2, 3, 8\].*\[E, rank, 9\]"),
        ({"lora_B": torch.ones(2, 6, 3)}, ValueError, r"lora_B is \[2, 6, 3\].*\[E, 7, rank\]"),
        ({"lora_B": torch.ones(2, 7, 4)}, ValueError, r"lora_A \[2, 3, 9\] and lora_B \[2, 7, 4\]"),
        ({"lora_B": torch.ones(2, 7, 3).bfloat16()}, TypeError, "lora_B is torch.bfloat16"),
        ({"gate_weight": torch.ones(3, 9)}, ValueError, r"gate_weight is \[3, 9\].*\[2, 9\]"),
        ({"gate_weight": torch.ones(2, 9).half()}, TypeError, "kept in torch.float32"),
        ({"gate_bias": torch.ones(3)}, ValueError, r"gate_bias is \[3\].*2 experts"),
        ({"gate_bias": torch.ones(2).half()}, TypeError, "kept in torch.float32"),
        ({"scaling": [1.0, 2.0, 3.0]}, ValueError, "scaling has 3 entries.*2 experts"),
        ({"gate": "relu"}, ValueError, "gate='relu'"),
        ({"routed": torch.ones(3)}, TypeError, "routed is torch.float32"),
        ({"routed": torch.ones(4).bool()}, ValueError, r"routed is \[4\].*3 tokens"),
        ({"backend": "cuda"}, ValueError, "backend='cuda'"),
        ({"weight": torch.ones(7, 9, device="meta")}, ValueError, "weight is on meta"),
        ({"gate_bias": torch.ones(2, device="meta")}, ValueError, "gate_bias is on meta"),
    ],
)
def test_bad_operands_are_named(changes, error, match):
    projection = oracle.random(M=3, N=7, K=9, E=2, rank=3, dtype=torch.float32)
    with pytest.raises(error, match=match):
        ops.mogu_linear(**projection.operands() | changes)


def test_zero_rank_and_too_many_experts_are_named():
    empty = oracle.random(M=3, N=7, K=9, E=2, rank=0, dtype=torch.float32)
    with pytest.raises(ValueError, match="rank 0"):
        call(empty)
    crowd = oracle.random(M=3, N=7, K=9, E=9, rank=1, dtype=torch.float32)
    crowd.scaling = 1.0
    with pytest.raises(ValueError, match="9 experts"):
        call(crowd)


def test_triton_refuses_what_it_cannot_run(monkeypatch):
    projection = oracle.random(M=3, N=7, K=9, E=2, rank=3, dtype=torch.float32)
    with pytest.raises(TypeError, match="float64"):
        call(projection.double(), backend="triton")
    monkeypatch.setattr(ops.checks, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        call(projection, backend="triton")
