"""Any base: quantised and foreign linears, shared shrinks, gated MLPs."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

import mogu_kernels as mk
from bench.trace import Trace
from mogu_kernels import launch
from mogu_kernels.modules import SharedInput
from mogu_kernels.ops import library
from tests import tiny


class Foreign(nn.Module):
    """A linear with codes and scales, and no weight."""

    def __init__(self, in_features=24, out_features=40):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("codes", torch.randint(-8, 8, (out_features, in_features)))
        self.register_buffer("scales", torch.rand(out_features, 1))

    def forward(self, hidden_states):
        return nn.functional.linear(hidden_states, self.codes * self.scales)


def quantised():
    logging.disable(logging.WARNING)  # torchao's, about the GPU libraries that it does not find
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    logging.disable(logging.NOTSET)
    model = nn.Sequential(nn.Linear(24, 40))
    quantize_(model, Int8WeightOnlyConfig())
    return model[0]


def trained(module):
    """Experts and routers with visible values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name in ("lora_B", "gate_weight", "gate_bias"):
            getattr(module, name).normal_()
    return module


def expected(module, x):
    """The formula around whatever the base answers, in fp64."""
    h = x.double()
    gates = torch.sigmoid(h @ module.gate_weight.double().T + module.gate_bias.double())
    y = gates.sum(-1, keepdim=True) * module.base(x).double()
    for e in range(module.num_experts):
        expert = h @ module.lora_A[e].double().T @ module.lora_B[e].double().T
        y = y + module.scaling[e] * gates[..., e : e + 1] * expert
    return y


def on(backend, monkeypatch):
    """CPU tensors go to one backend, modules and all: "triton" is interpreted."""
    monkeypatch.setattr(library, "choose", lambda _, x, built=True: backend)


def listen(monkeypatch):
    """The names of the kernels that are launched from here on."""
    names, original = [], launch._run

    def run(kernel, grid, **arguments):
        names.append(kernel.__name__.removesuffix("_kernel"))
        original(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "_run", run)
    return names


@pytest.mark.parametrize("make", [quantised, Foreign])
@pytest.mark.parametrize("triton", [False, True])
def test_any_base_is_routed_around(make, triton, monkeypatch):
    base = make()
    module = trained(mk.MoGULinear.from_linear(base, rank=3))
    x = torch.randn(2, 5, 24)
    if triton:
        on("triton", monkeypatch)
    names = listen(monkeypatch)
    with torch.no_grad():
        y = module(x)
    assert not module.is_fused
    assert names == (["shrink_gate", "gated_expand"] if triton else [])
    torch.testing.assert_close(y.double(), expected(module, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [quantised, Foreign])
def test_any_base_is_untouched_where_routing_is_off(make):
    base = make()
    module = trained(mk.MoGULinear.from_linear(base, rank=3))
    x = torch.randn(3, 5, 24)
    plain = base(x)
    with mk.routing(module, False):
        assert torch.equal(module(x), plain)
    with mk.routing(module, torch.tensor([False, True, False])), torch.no_grad():
        y = module(x)
    assert torch.equal(y[[0, 2]], plain[[0, 2]])
    assert not torch.equal(y[1], plain[1])


@pytest.mark.parametrize("make", [quantised, Foreign])
def test_gradients_flow_around_any_base(make):
    module = trained(mk.MoGULinear.from_linear(make(), rank=3))
    x = torch.randn(5, 24, requires_grad=True)
    module(x).square().sum().backward()
    assert (x.grad != 0).any()
    for name in ("lora_A", "lora_B", "gate_weight", "gate_bias"):
        assert (getattr(module, name).grad != 0).any(), name


def test_a_foreign_base_keeps_its_state_and_follows_its_module():
    base = Foreign()
    module = trained(mk.MoGULinear.from_linear(base, rank=3))
    assert {"codes", "scales"} <= set(module.state_dict())
    other = copy.deepcopy(module)
    assert other.base.codes is other.codes
    x = torch.randn(5, 24)
    assert torch.equal(other(x), module(x))
    module.to("meta")
    assert base.scales.is_meta
    assert not other.base.scales.is_meta
    assert "base=Foreign" in repr(other)


def test_a_projection_with_adapters_of_its_own_is_refused():
    linear = nn.Linear(4, 5)
    linear.lora_A = nn.Linear(4, 2)
    with pytest.raises(TypeError, match="Linear has lora_A of its own: merge or unload"):
        mk.MoGULinear.from_linear(linear)


LONG = 130  # tokens that take two launches


@pytest.fixture
def attached():
    """(model with every projection routed, the plain model)."""
    plain = tiny.llama()
    model = copy.deepcopy(plain)
    mk.attach(model, tiny.checkpoint(model, tiny.EVERY_TARGET))
    return model, plain


@pytest.mark.parametrize("tokens", [5, LONG])
def test_a_layer_costs_its_budget_of_launches(attached, monkeypatch, tokens):
    model, _ = attached
    ids = tiny.prompt(tokens)
    with torch.no_grad():
        on("eager", monkeypatch)
        eager = model(ids, use_cache=False).logits
        on("triton", monkeypatch)
        names = listen(monkeypatch)
        logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, eager, rtol=1e-4, atol=1e-4)
    mlp = ["shrink_gate", "gated_mlp"]
    if tokens == LONG:
        linear = ["shrink_gate", "gated_linear"]
        assert names == 2 * ["shrink_gate", *3 * ["gated_linear"], *linear, *mlp, *linear]
    else:
        assert names == 2 * [*4 * ["fused"], *mlp, "fused"]


def test_masks_reach_shared_shrinks_and_gated_mlps(attached, monkeypatch):
    model, plain = attached
    ids = tiny.prompt(LONG // 2 + 1, batch=2)
    with torch.no_grad():
        on("eager", monkeypatch)
        routed = model(ids, use_cache=False).logits
        base = plain(ids, use_cache=False).logits
        on("triton", monkeypatch)
        with mk.routing(model, torch.tensor([True, False])):
            mixed = model(ids, use_cache=False).logits
        with mk.routing(model, False):
            assert torch.equal(model(ids, use_cache=False).logits, base)
    torch.testing.assert_close(mixed[0], routed[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], base[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(routed[1], base[1], rtol=1e-2, atol=1e-2)


def test_gates_of_shared_shrinks_and_gated_mlps_are_recorded(attached, monkeypatch):
    model, _ = attached
    ids = tiny.prompt(LONG)
    with torch.no_grad():
        on("eager", monkeypatch)
        with mk.record_gates(model) as expected_gates:
            model(ids, use_cache=False)
        on("triton", monkeypatch)
        with mk.record_gates(model) as gates:
            model(ids, use_cache=False)
    assert gates.keys() == expected_gates.keys()
    assert len(gates) == 14
    for name, gate in gates.items():
        torch.testing.assert_close(gate, expected_gates[name], rtol=1e-4, atol=1e-4)


def test_a_shared_shrink_notices_other_hidden_states_and_masks(monkeypatch):
    on("triton", monkeypatch)
    modules = [trained(mk.MoGULinear(24, 40, rank=3)).requires_grad_(False) for _ in range(2)]
    alone = copy.deepcopy(modules)
    for module in modules:
        module.shared_input = SharedInput(modules)
        module.shared_input = modules[0].shared_input
    for module in (*modules, *alone):
        module.routing = modules[0].routing
    model = nn.ModuleList(modules)
    x, other = torch.randn(2, LONG // 2, 24).repeat(1, 2, 1), torch.randn(2, LONG, 24)
    calls = [(0, x), (1, other), (1, other), (0, x), (1, x), (1, x)]
    for place, hidden_states in calls:
        assert torch.equal(modules[place](hidden_states), alone[place](hidden_states))
    modules[0](x)
    with mk.routing(model, torch.tensor([True, False])):
        assert torch.equal(modules[1](x), alone[1](x))
        assert torch.equal(modules[0](x), alone[0](x))
    assert modules[0].shared_input._input is None  # nothing is kept once all have been served


def test_attach_fuses_gated_mlps_and_detach_undoes_it():
    model = tiny.llama()
    mlps = [layer.mlp for layer in model.model.layers]
    keys = set(model.state_dict())
    report = mk.attach(model, tiny.checkpoint(model, ("gate_proj", "up_proj")))
    assert report.fused_mlps == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert all(isinstance(layer.mlp, mk.MoGUGatedMLP) for layer in model.model.layers)
    assert keys <= set(model.state_dict())
    mk.detach(model)
    assert all(layer.mlp is mlp for layer, mlp in zip(model.model.layers, mlps, strict=True))
    assert set(model.state_dict()) == keys
    report = mk.attach(model, tiny.checkpoint(model, ("gate_proj",)))
    assert report.fused_mlps == ()


def test_a_gated_mlp_is_copied_pickled_compiled_and_trained():
    model = tiny.llama()
    mk.attach(model, tiny.checkpoint(model, ("gate_proj", "up_proj")), trainable=True)
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 5, 64)
    y = mlp(x)
    for other in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert torch.equal(other(x), y)
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    y.square().sum().backward()
    assert all((p.grad != 0).any() for p in mlp.parameters() if p.requires_grad)


def test_a_gated_mlp_refuses_projections_that_do_not_go_together():
    one, other = mk.MoGULinear(24, 40), mk.MoGULinear(24, 40, rank=3)
    with pytest.raises(ValueError, match="do not go together"):
        mk.MoGUGatedMLP(one, other, nn.Identity())
    with pytest.raises(ValueError, match="activation='relu'"):
        mk.MoGUGatedMLP(one, one, nn.Identity(), "relu")


@pytest.mark.model
def test_a_swapped_decoder_layer_adds_no_launch_at_decode(monkeypatch):
    """o_proj of the real model: the fused kernel stands in for the base GEMM."""
    from demo.smollm2 import load_smollm2

    model, _ = load_smollm2()
    mk.attach(model, tiny.checkpoint(model))
    projection = model.model.layers[0].self_attn.o_proj
    x = torch.randn(1, 1, projection.in_features)
    with torch.no_grad():
        eager = projection(x)
        on("triton", monkeypatch)
        with Trace() as trace:
            y = projection(x)
    assert trace.launches == 1
    torch.testing.assert_close(y, eager, rtol=1e-4, atol=1e-4)


class Tripled(nn.Linear):
    """A linear that does more than its weight says."""

    def forward(self, hidden_states):
        return 3 * super().forward(hidden_states)


def hooked():
    linear = nn.Linear(24, 40)
    linear.register_forward_hook(lambda module, args, out: out + 1)
    return linear


@pytest.mark.parametrize("make", [lambda: Tripled(24, 40), hooked])
def test_a_linear_that_does_more_is_called_not_fused(make):
    module = trained(mk.MoGULinear.from_linear(make(), rank=3))
    x = torch.randn(5, 24)
    assert not module.is_fused
    torch.testing.assert_close(module(x).double(), expected(module, x), rtol=1e-5, atol=1e-5)


def test_a_foreign_base_takes_part_in_autocast():
    module = trained(mk.MoGULinear.from_linear(Foreign(), rank=3))
    x = torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    torch.testing.assert_close(y.double(), expected(module, x), rtol=0.05, atol=0.5)


def test_a_foreign_base_follows_parameters_that_are_replaced():
    module = mk.MoGULinear.from_linear(Tripled(24, 40), rank=3)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items()}
    module.load_state_dict(zeros, assign=True)
    assert not module(torch.randn(5, 24)).any()


def test_gated_mlps_with_a_bias_on_one_side_stay_apart():
    one, other = mk.MoGULinear(24, 40), mk.MoGULinear(24, 40, bias=False)
    with pytest.raises(ValueError, match="do not go together"):
        mk.MoGUGatedMLP(one, other, nn.Identity())


@pytest.mark.parametrize("make", [quantised, Foreign])
def test_a_foreign_base_compiles_whole(make):
    module = trained(mk.MoGULinear.from_linear(make(), rank=3)).requires_grad_(False)
    x = torch.randn(5, 24)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
