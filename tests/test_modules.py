"""MoGULinear where an nn.Linear was."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import mogu_kernels as mk
from tests import oracle


def routed(bias=True, dtype=torch.float32, **kwargs):
    """A module whose experts and routers have visible values."""
    torch.manual_seed(0)
    module = mk.MoGULinear.from_linear(nn.Linear(24, 40, bias, dtype=dtype), rank=3, **kwargs)
    with torch.no_grad():
        module.lora_B.normal_()
        if module.router is None:
            module.gate_weight.normal_()
            module.gate_bias.normal_()
    return module


def projection(module, x):
    """The oracle's view of a module."""
    return oracle.Projection(
        x=x,
        weight=module.weight.detach(),
        bias=None if module.bias is None else module.bias.detach(),
        lora_A=module.lora_A.detach(),
        lora_B=module.lora_B.detach(),
        gate_weight=module.gate_weight.detach(),
        gate_bias=module.gate_bias.detach(),
        scaling=module.scaling,
        gate=module.gate,
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_module_matches_fp64(bias, gate, dtype):
    module = routed(bias, dtype, gate=gate, scaling=[2.0, 0.5])
    x = torch.randn(2, 9, 24).to(dtype)
    y = module(x)
    assert y.shape == (2, 9, 40)
    oracle.assert_matches(
        actual=y.detach().flatten(0, 1), projection=projection(module, x.flatten(0, 1))
    )


def test_a_new_module_with_two_experts_is_its_base():
    linear = nn.Linear(24, 40)
    module = mk.MoGULinear.from_linear(linear)
    x = torch.randn(5, 24)
    torch.testing.assert_close(module(x), linear(x))


def test_it_is_an_nn_linear_that_shares_its_parameters():
    linear = nn.Linear(24, 40)
    module = mk.MoGULinear.from_linear(linear)
    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features) == (24, 40)
    assert module.weight is linear.weight
    assert module.bias is linear.bias
    assert module.base is linear
    assert {"weight", "bias", "lora_A", "lora_B", "gate_weight", "gate_bias"} == set(
        module.state_dict()
    )


@pytest.mark.parametrize("shape", [(24,), (0, 24), (3, 0, 24), (2, 3, 4, 24)])
def test_any_leading_shape_works(shape):
    assert routed()(torch.randn(shape)).shape == (*shape[:-1], 40)


def test_the_router_stays_wide_when_the_model_is_narrowed():
    module = routed()
    gate_weight = module.gate_weight.clone()
    module.to(torch.bfloat16)
    assert module.weight.dtype == module.lora_A.dtype == torch.bfloat16
    assert torch.equal(module.gate_weight, gate_weight)
    module.half()
    assert torch.equal(module.gate_weight, gate_weight)
    assert module.double().gate_weight.dtype == torch.float64


def test_moving_to_another_device_moves_the_router_too():
    module = routed().to("meta")
    assert {p.device.type for p in module.parameters()} == {"meta"}


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_answer_alike_and_share_nothing(way):
    module = routed()
    if way == "deepcopy":
        other = copy.deepcopy(module)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(module))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = mk.MoGULinear(24, 40, rank=3)
        other.load_state_dict(module.state_dict())
    x = torch.randn(5, 24)
    assert torch.equal(other(x), module(x))
    assert other.weight.data_ptr() != module.weight.data_ptr()
    if other.base is not None:
        assert other.base.weight is other.weight


def test_repr_says_what_it_is():
    assert repr(routed(False)) == (
        "MoGULinear(in_features=24, out_features=40, bias=False, rank=3, num_experts=2, "
        "gate=sigmoid, router=linear)"
    )


def test_export_and_inference_mode_and_compile_agree():
    module, x = routed(), torch.randn(5, 24)
    with torch.no_grad():
        expected = module(x)
    with torch.inference_mode():
        assert torch.equal(module(x), expected)
    exported = torch.export.export(module, (x,)).module()
    assert torch.equal(exported(x), expected)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 3, 4):
        y = compiled(x[:tokens].clone())
        torch.testing.assert_close(y, expected[:tokens], rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_autocast_works():
    module, x = routed(), torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.2)


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_gradients_reach_experts_router_and_input(router):
    module = routed(router=router, router_hidden=16)
    x = torch.randn(5, 24, requires_grad=True)
    module(x).square().sum().backward()
    assert (x.grad != 0).all()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


def test_folding_an_mlp_router_changes_no_answer():
    module = routed(router="mlp", router_hidden=16)
    x = torch.randn(5, 24)
    before = module(x)
    assert module.fold_() is module
    assert module.router is None
    assert "gate_weight" in module.state_dict()
    assert torch.equal(module(x), before)


def test_routing_off_is_the_plain_linear_and_is_restored_after_an_error():
    module, x = routed(), torch.randn(2, 5, 24)
    expected, plain = module(x), nn.functional.linear(x, module.weight, module.bias)

    def interrupted():
        with mk.routing(module, False):
            assert torch.equal(module(x), plain)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(module(x), expected)


def test_routing_by_sequence_mixes_routed_and_plain():
    module, x = routed(), torch.randn(3, 5, 24)
    expected, plain = module(x), nn.functional.linear(x, module.weight, module.bias)
    with mk.routing(module, torch.tensor([False, False, False])):
        unrouted = module(x)
    with mk.routing(module, torch.tensor([True, False, True])):
        y = module(x)
    assert torch.equal(y[[0, 2]], expected[[0, 2]])
    assert torch.equal(y[1], unrouted[1])
    torch.testing.assert_close(unrouted, plain)
    assert not torch.allclose(plain[0], expected[0], rtol=0.01)


def test_recorded_gates_are_the_routers_words_over_all_passes():
    model = nn.Sequential(routed())
    x = torch.randn(2, 5, 24)
    with mk.record_gates(model) as gates:
        model(x[:, :3])
        with mk.routing(model, False):
            model(x)
        model(x[:, 3:])
    assert gates.keys() == {"0"}
    expected = oracle.true_gates(projection(model[0], x.flatten(0, 1))).view(2, 5, 2)
    torch.testing.assert_close(gates["0"].double(), expected, rtol=0, atol=1e-6)


def test_copies_have_a_routing_state_of_their_own():
    module, x = routed(), torch.randn(5, 24)
    other = copy.deepcopy(module)
    with mk.routing(module, False):
        assert not torch.equal(other(x), module(x))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: mk.MoGULinear(4, 5, gate="relu"), ValueError, "gate='relu'"),
        (lambda: mk.MoGULinear(4, 5, router="cnn"), ValueError, "router='cnn'"),
        (lambda: mk.MoGULinear(4, 5, scaling=[1.0]), ValueError, "scaling has 1 entries"),
        (
            lambda: mk.MoGULinear.from_linear(nn.Conv1d(4, 5, 1)),
            TypeError,
            "Conv1d has no",
        ),
        (lambda: mk.MoGULinear.from_linear(routed()), TypeError, "routed already"),
        (lambda: routed()(torch.ones(3, 23)), ValueError, "in_features=24 but.*23"),
        (lambda: mk.record_gates(nn.Linear(4, 5)).__enter__(), ValueError, "no routed projection"),
        (lambda: mk.routing(nn.Linear(4, 5), True).__enter__(), ValueError, "no routed projection"),
        (lambda: mk.routing(routed(), torch.ones(3)).__enter__(), TypeError, "torch.float32"),
    ],
)
def test_bad_calls_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_routing_mask_for_another_batch_is_named():
    module = routed()
    mask = torch.tensor([True, False])
    with mk.routing(module, mask), pytest.raises(ValueError, match=r"mask is \[2\] .*\[3, 5, 24\]"):
        module(torch.randn(3, 5, 24))


def test_gates_cannot_be_recorded_twice_at_once():
    module = routed()
    with (
        mk.record_gates(module),
        pytest.raises(ValueError, match="already"),
        mk.record_gates(module),
    ):
        pass


def test_recording_ends_even_where_the_passes_do_not_fit_together():
    module = routed()

    def two_batches():
        with mk.record_gates(module):
            module(torch.randn(2, 3, 24))
            module(torch.randn(3, 3, 24))

    for _ in range(2):
        with pytest.raises(ValueError, match=r"no common batch \(\[2, 3, 2\], \[3, 3, 2\]\)"):
            two_batches()
    assert module.routing.log is None


def test_a_module_made_on_the_meta_device_can_be_given_memory():
    module = mk.MoGULinear(24, 40, device="meta")
    assert module(torch.empty(2, 24, device="meta")).is_meta
    assert module.to_empty(device="cpu").gate_weight.device.type == "cpu"


def test_a_routing_mask_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"\[2, 3, 1\]: take one entry per sequence"):
        mk.routing(routed(), torch.ones(2, 3, 1).bool()).__enter__()


def test_a_mask_of_tokens_routes_those_alone():
    module, x = routed(), torch.randn(2, 5, 24)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, 3] = True
    everything, plain = module(x), nn.functional.linear(x, module.weight, module.bias)
    with mk.record_gates(module) as gates, mk.routing(module, mask):
        y = module(x)
    torch.testing.assert_close(y[:, 3], everything[:, 3])
    torch.testing.assert_close(y[:, :3], plain[:, :3])
    (recorded,) = gates.values()
    assert recorded.shape == (2, 5, 2)


def test_gates_of_one_part_of_a_model_can_be_recorded():
    model = nn.Sequential(routed(), nn.Linear(40, 24), routed())
    model[2].routing = model[0].routing
    with mk.record_gates(model[2]) as gates:
        model(torch.randn(2, 5, 24))
    assert {name: gate.shape for name, gate in gates.items()} == {"MoGULinear": (2, 5, 2)}
