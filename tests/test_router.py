"""The fold is exact, differentiable, and survives half precision as two parts."""

import pytest
import torch

import mogu_kernels as mk
from demo.published import published_projection
from mogu_kernels.router import split_gate_weight
from tests import oracle, tiny


def router(dtype=torch.float64, E=2, K=24, H=16):
    torch.manual_seed(0)
    return mk.Router(K, E, H, dtype=dtype)


def unfolded(r, h):
    """The three linears of each expert, one after the other."""
    logits = []
    for e in range(len(r.linear_0.weight)):
        inner = h @ r.linear_0.weight[e].T
        inner = inner @ r.linear_1.weight[e].T + r.linear_1.bias[e]
        logits.append(inner @ r.linear_2.weight[e].T + r.linear_2.bias[e])
    return torch.cat(logits, -1)


@pytest.mark.parametrize("E", [1, 2, 8])
def test_folding_is_exact(E):
    r = router(E=E)
    h = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(r(h), unfolded(r, h), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("target", ["o_proj", "down_proj"])
def test_folded_projection_equals_the_unfolded_reference_in_fp64(gate, target):
    model = tiny.llama(torch.float64)
    checkpoint = tiny.checkpoint(model, (target,), gate=gate, ranks=(8, 3))
    checkpoint.tensors = {key: t.double() for key, t in checkpoint.tensors.items()}
    name = checkpoint.modules[0]
    base = model.get_submodule(name)
    published = published_projection(base, checkpoint.module_tensors(name), checkpoint.config)
    h = torch.randn(2, 7, base.in_features, dtype=torch.float64)
    expected = published(h)
    mk.attach(model, checkpoint)
    with mk.record_gates(model) as gates:
        y = model.get_submodule(name)(h)
    assert (y - expected).abs().max() <= 1e-12 * expected.abs().max()
    recorded = gates[name]
    torch.testing.assert_close(recorded[..., 0:1], published.last_beta, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(recorded[..., 1:2], published.last_alpha, rtol=1e-12, atol=1e-12)


def test_gradients_reach_the_unfolded_router():
    r = router()
    h = torch.randn(5, 24, dtype=torch.float64)
    ours = torch.autograd.grad(r(h).square().sum(), list(r.parameters()))
    theirs = torch.autograd.grad(unfolded(r, h).square().sum(), list(r.parameters()))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("E", [1, 3])
def test_the_fold_passes_gradcheck_in_every_linear(E):
    linears = [
        parameter.detach().requires_grad_() for parameter in router(E=E, K=5, H=4).parameters()
    ]

    def folded(*tensors):
        return mk.fold_router(*tensors, dtype=torch.float64)

    assert torch.autograd.gradcheck(folded, linears, atol=1e-9, rtol=1e-7)
    assert torch.autograd.gradgradcheck(folded, linears)


def test_frozen_linears_get_no_gradient():
    r = router()
    r.linear_0.weight.requires_grad_(False)
    r(torch.randn(5, 24, dtype=torch.float64)).sum().backward()
    assert r.linear_0.weight.grad is None
    assert (r.linear_1.weight.grad != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fold_keeps_nothing_but_the_parameters_for_backward(dtype):
    r, kept = router(dtype), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gate_weight, gate_bias = r.fold()
    own = {parameter.data_ptr() for parameter in r.parameters()}
    assert {t.data_ptr() for t in kept} == own
    (gate_weight.square().sum() + gate_bias.sum()).backward()
    assert all(p.grad.dtype == dtype and (p.grad != 0).any() for p in r.parameters())


def test_the_fold_compiles_in_one_graph_and_exports():
    r, h = router(torch.float32), torch.randn(5, 24)
    expected = torch.autograd.grad(r(h).square().sum(), list(r.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(r, backend="aot_eager", fullgraph=True)
    grads = torch.autograd.grad(compiled(h).square().sum(), list(r.parameters()))
    torch.testing.assert_close(grads, expected)
    torch.testing.assert_close(torch.export.export(r, (h,)).module()(h), r(h))


def test_fp32_routers_are_folded_in_fp64():
    r = router(torch.float32, K=576, H=512)
    exact = mk.Router(576, 2, 512, dtype=torch.float64)
    exact.load_state_dict(r.state_dict())
    ours, truth = r.fold()[0].double(), exact.fold(torch.float64)[0]
    assert ((ours - truth).abs() <= 2**-24 * truth.abs()).all()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 7e-6), (torch.float16, 7e-6)])
def test_two_parts_keep_gates_and_one_does_not(dtype, bound):
    gate_weight = torch.randn(2, 4096) / 16
    x = torch.randn(64, 4096).to(dtype).double()
    split = split_gate_weight(gate_weight, dtype)
    assert split.shape == (2, 2, 4096)
    exact = (x @ gate_weight.double().T).sigmoid()
    error = ((x @ split.double().sum(0).T).sigmoid() - exact).abs().max()
    one_part = ((x @ split[0].double().T).sigmoid() - exact).abs().max()
    assert error <= bound
    assert one_part > 20 * error


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"linear_0_weight": torch.ones(5, 6)}, r"linear_0_weight is \[5, 6\]"),
        ({"linear_1_weight": torch.ones(2, 5, 6)}, r"linear_1_weight is \[2, 5, 6\].*\[2, 6, 5\]"),
        ({"linear_1_bias": torch.ones(2, 5)}, r"linear_1_bias is \[2, 5\].*\[2, 6\]"),
        ({"linear_2_weight": torch.ones(2, 6)}, r"linear_2_weight is \[2, 6\].*\[2, 1, 6\]"),
        ({"linear_2_bias": torch.ones(2)}, r"linear_2_bias is \[2\].*\[2, 1\]"),
    ],
)
def test_linears_that_do_not_fit_are_named(change, match):
    linears = {
        "linear_0_weight": torch.ones(2, 5, 6),
        "linear_1_weight": torch.ones(2, 6, 5),
        "linear_1_bias": torch.ones(2, 6),
        "linear_2_weight": torch.ones(2, 1, 6),
        "linear_2_bias": torch.ones(2, 1),
    }
    with pytest.raises(ValueError, match=match):
        mk.fold_router(**linears | change)


def test_oracle_and_op_agree_on_a_split_router():
    projection = oracle.random(M=5, N=7, K=9, E=2, rank=3, dtype=torch.bfloat16)
    projection.gate_weight = split_gate_weight(projection.gate_weight, torch.bfloat16)
    y = mk.ops.mogu_linear(**projection.operands())
    oracle.assert_matches(actual=y, projection=projection)
