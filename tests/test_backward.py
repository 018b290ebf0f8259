"""Gradients of the routed projection: exact, lean, deterministic, in three launches."""

import itertools

import pytest
import torch
from torch import nn
from triton.runtime.errors import InterpreterError

import mogu_kernels as mk
from bench.peers import official
from bench.peers import problem as peers
from bench.trace import Trace
from mogu_kernels import eager, launch, ops
from mogu_kernels.router import split_gate_weight
from tests import cases, mutants, oracle, red_zones

OPERANDS = ("x", "weight", "bias", "lora_A", "lora_B", "gate_weight", "gate_bias")
FORMS = [
    pytest.param(gate, E, bias, routed, id=f"{gate}-e{E}" + "-bias" * bias + "-routed" * routed)
    for gate, E, bias, routed in itertools.product(
        ("sigmoid", "softmax"), (1, 2, 3), (False, True), (False, True)
    )
]
all_forms = pytest.mark.parametrize(("gate", "E", "bias", "routed"), FORMS)
# M, N, K, E, rank, gate, bias, routed: several tiles and chunks of ranks, sizes odd somewhere
SHAPES = {
    "m70-n65-k131-e2-r8": (70, 65, 131, 2, 8, "sigmoid", True, True),
    "m33-n70-k40-e3-r7-softmax": (33, 70, 40, 3, 7, "softmax", True, True),
    "m1-n17-k66-e1-r1": (1, 17, 66, 1, 1, "sigmoid", False, False),
    "m18-n136-k72-e8-r17": (18, 136, 72, 8, 17, "sigmoid", True, False),
    "m19-n72-k40-e8-r9-softmax": (19, 72, 40, 8, 9, "softmax", False, True),
}
all_shapes = pytest.mark.parametrize("shape", SHAPES)


def make(shape, dtype, seed=0):
    """A named projection; those of fp64 are wide all through."""
    M, N, K, E, rank, gate, bias, routed = SHAPES[shape]
    sizes = {"M": M, "N": N, "K": K, "E": E, "rank": rank}
    options = {"gate": gate, "bias": bias, "routed": routed, "seed": seed}
    projection = oracle.random(**sizes, **options, dtype=dtype)
    return projection.double() if dtype == torch.float64 else projection


def gradients(projection, function, weights):
    """By name, of the sum of `weights` times y and gates, as `function` gives them."""
    names = [name for name in OPERANDS if getattr(projection, name) is not None]
    leaves = {name: getattr(projection, name).detach().requires_grad_() for name in names}
    p = oracle.Projection(**projection.operands() | leaves)
    outputs = zip(function(p), weights, strict=True)
    loss = sum((out.double() * weight).sum() for out, weight in outputs)
    return dict(zip(names, torch.autograd.grad(loss, leaves.values()), strict=True))


def the_op(backend="auto"):
    return lambda p: ops.mogu_linear(**p.operands(), return_gates=True, backend=backend)


def the_formula(p):
    return oracle.truth(p), oracle.true_gates(p)


def upstream(projection):
    """Gradients of y and of the gates, in values that every dtype holds."""
    generator = torch.Generator().manual_seed(7)
    M, N, E = len(projection.x), len(projection.weight), len(projection.lora_A)
    of_y, of_gates = (torch.randn(M, n, generator=generator) for n in (N, E))
    return of_y.to(projection.x.dtype).double(), of_gates.double()


@pytest.fixture(params=["eager", "triton"])
def backward(request, monkeypatch):
    """Both backwards behind the eager forward, which takes fp64; Triton's in the interpreter."""
    if request.param == "triton":
        monkeypatch.setattr(eager, "mogu_linear_backward", launch.mogu_linear_backward)
    return request.param


def small(gate, E, bias, routed):
    sizes = {"M": 4, "N": 5, "K": 6, "E": E, "rank": 3}
    form = {"gate": gate, "bias": bias, "routed": routed}
    return oracle.random(**sizes, **form, dtype=torch.float64).double()


@all_forms
def test_gradcheck_passes_in_every_input(gate, E, bias, routed, backward):
    projection = small(gate, E, bias, routed)
    names = [name for name in OPERANDS if getattr(projection, name) is not None]

    def function(*tensors):
        return the_op()(
            oracle.Projection(**projection.operands() | dict(zip(names, tensors, strict=True)))
        )

    leaves = [getattr(projection, name).requires_grad_() for name in names]
    fast = backward == "triton"  # the interpreter is not
    assert torch.autograd.gradcheck(
        function, leaves, eps=1e-5, atol=1e-9, rtol=1e-8, fast_mode=fast
    )


@all_forms
@pytest.mark.usefixtures("backward")
def test_gradients_are_those_of_the_formula(gate, E, bias, routed):
    projection = small(gate, E, bias, routed)
    weights = upstream(projection)
    ours, truth = (gradients(projection, f, weights) for f in (the_op(), the_formula))
    for name, grad in truth.items():
        torch.testing.assert_close(ours[name], grad, rtol=0, atol=1e-9)


@all_shapes
@pytest.mark.usefixtures("backward")
def test_gradients_of_many_tiles_are_those_of_the_formula(shape):
    projection = make(shape, torch.float64)
    weights = upstream(projection)
    ours, truth = (gradients(projection, f, weights) for f in (the_op(), the_formula))
    for name, grad in truth.items():
        torch.testing.assert_close(ours[name], grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.usefixtures("backward")
def test_gradients_of_the_unfolded_router_are_those_of_three_linears(gate):
    projection, router = small(gate, 2, True, True), mk.Router(6, 2, 4, dtype=torch.float64)
    weights, parameters = upstream(projection), list(router.parameters())

    def unfolded(p):
        inner = torch.einsum("mk,ehk->emh", p.x, router.linear_0.weight)
        inner = inner @ router.linear_1.weight.mT + router.linear_1.bias[:, None]
        logits = inner @ router.linear_2.weight.mT + router.linear_2.bias[:, None]
        # the formula's logits with a router of zeros and the bias that a token asks for
        rows = [
            oracle.truth(
                oracle.Projection(
                    **p.operands()
                    | {
                        "x": p.x[m : m + 1],
                        "routed": p.routed[m : m + 1],
                        "gate_weight": torch.zeros(2, 6, dtype=torch.float64),
                        "gate_bias": logits[:, m, 0],
                    }
                )
            )
            for m in range(len(p.x))
        ]
        return torch.cat(rows)

    def folded(p):
        gate_weight, gate_bias = router.fold(torch.float64)
        fold = {"gate_weight": gate_weight, "gate_bias": gate_bias}
        return ops.mogu_linear(**p.operands() | fold)

    ours, truth = (
        torch.autograd.grad((f(projection) * weights[0]).sum(), parameters)
        for f in (folded, unfolded)
    )
    for mine, grad in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, grad, rtol=0, atol=1e-9)


@all_shapes
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("backend", ["eager", cases.CPP, "triton"])
def test_gradients_are_as_good_as_plain_pytorchs(shape, dtype, backend):
    """RMS error at most PyTorch's in half precision; the largest at most twice its in fp32."""
    projection = make(shape, cases.DTYPES[dtype])
    weights = upstream(projection)
    weights = weights[0], weights[1] * 0  # plain PyTorch gives no gates
    double = projection.double()
    truth = gradients(double, the_formula, weights)
    plain = gradients(projection, lambda p: (oracle.plain_pytorch(p), p.gate_bias), (weights[0], 0))
    ours = gradients(projection, the_op(backend), weights)
    for name, grad in truth.items():
        assert ours[name].dtype == getattr(projection, name).dtype
        error, theirs = ((g[name].double() - grad).abs() for g in (ours, plain))
        if dtype == "f32":
            floor = 32 * oracle.EPSILON * grad.abs().max()  # PyTorch's sum may be exact by luck
            assert error.max() <= floor + 2 * theirs.max(), f"{name}: {error.max():.3g} off"
        else:
            floor = 2.0**-12 * oracle.UNIT[projection.x.dtype] * grad.square().mean().sqrt() + 1e-9
            ratio = error.square().mean().sqrt() / theirs.square().mean().sqrt().clamp_min(floor)
            assert ratio <= 1.001, f"{name}: {ratio:.4g}x PyTorch's RMS"  # both may round once


def kept_per_token(function, width, dtype) -> float:
    """Bytes that a call keeps for backward, by how they grow with the tokens."""

    def kept(tokens):
        found = {}

        def pack(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(tokens, width).to(dtype).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = function(x)
        found.pop(x.untyped_storage().data_ptr(), None)  # the layer input
        y.sum().backward()
        return sum(found.values())

    return (kept(7) - kept(3)) / 4


@pytest.mark.parametrize("router", ["linear", "mlp"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("backend", ["auto", "eager", "triton"])
def test_no_more_than_80_bytes_a_token_are_kept(backend, dtype, router, monkeypatch):
    module = mk.MoGULinear(40, 72, rank=8, router=router, dtype=cases.DTYPES[dtype])
    monkeypatch.setattr(
        ops.library, "choose", lambda _, x, choose=ops.library.choose: choose(backend, x)
    )
    assert kept_per_token(module, 40, cases.DTYPES[dtype]) == 72


def test_the_official_block_keeps_43_kilobytes_where_ours_keeps_72_bytes():
    width = 4096
    problem = peers.make(M=1, N=width, K=width, rank=8, dtype=torch.bfloat16)
    p = problem.projection
    projection = official.build(problem, False).train()
    assert kept_per_token(projection, width, torch.bfloat16) > 40_000
    operands = p.operands() | {"lora_A": p.lora_A.requires_grad_()}
    operands.pop("x")
    assert kept_per_token(lambda x: ops.mogu_linear(x, **operands), width, torch.bfloat16) == 72


def test_nothing_is_kept_where_no_gradient_is_asked_for(monkeypatch):
    projection = make("m33-n70-k40-e3-r7-softmax", torch.float32)
    seen, op = [], torch.ops.mogu.mogu_linear
    monkeypatch.setattr(torch.ops.mogu, "mogu_linear", lambda *a: seen.append(op(*a)) or seen[-1])
    the_op("triton")(projection)
    projection.x.requires_grad_()
    the_op("triton")(projection)
    assert [ranks.shape[1] for _, _, ranks in seen] == [0, 21]


@pytest.mark.parametrize("kernel", cases.KERNELS)
def test_forward_keeps_its_bits_and_backward_takes_three_launches(kernel):
    p = oracle.random(M=19, N=72, K=40, E=2, rank=8, dtype=torch.float16)
    p.lora_B = cases.side_by_side(p.lora_B)
    p.bias = torch.stack([p.bias, p.bias * 2], 1)[:, 0]
    options = {"backend": "triton", "config": cases.KERNELS[kernel]}
    with torch.no_grad(), Trace() as expected:
        y = ops.mogu_linear(**p.operands(), **options)
    for name in OPERANDS:
        setattr(p, name, getattr(p, name).requires_grad_())
    with Trace() as trace:
        trained = ops.mogu_linear(**p.operands(), **options)
    assert trace.launches == (2 if kernel == "one_launch" else expected.launches)
    assert torch.equal(trained, y)
    with Trace() as trace:
        trained.sum().backward()
    names = [one.name.removesuffix("_kernel") for one in trace.log]
    assert names == ["backward_gates", "backward_input", "backward_weights"]


WANTS = {
    ("x",): (2, 3),  # launches with softmax, with sigmoid gates
    ("lora_A", "lora_B"): (2, 2),
    ("gate_weight", "gate_bias"): (2, 3),
    ("gate_bias",): (2, 3),
    ("weight", "bias"): (1, 1),
    ("x", "lora_B", "gate_weight"): (3, 3),
}


@pytest.mark.parametrize("names", WANTS, ids="-".join)
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_only_wanted_gradients_are_computed(names, gate, backend):
    projection = make("m33-n70-k40-e3-r7-softmax", torch.float32)
    projection.gate, weights = gate, upstream(projection)
    every = gradients(projection, the_op(backend), weights)
    leaves = {name: getattr(projection, name).detach().requires_grad_() for name in names}
    p = oracle.Projection(**projection.operands() | leaves)
    y, gates = the_op(backend)(p)
    with Trace() as trace:
        ((y * weights[0]).sum() + (gates * weights[1]).sum()).backward()
    assert trace.launches == (WANTS[names][gate == "sigmoid"] if backend == "triton" else 0)
    for name in OPERANDS:
        grad = getattr(p, name).grad
        assert (grad is None) == (name not in names)
        assert grad is None or torch.equal(grad, every[name])


@pytest.mark.parametrize(("shape", "dtype"), list(zip(SHAPES, itertools.cycle(cases.DTYPES))))
def test_programs_in_any_order_stay_in_bounds_and_give_the_same_bits(shape, dtype):
    projection = make(shape, cases.DTYPES[dtype])
    weights = upstream(projection)
    expected = gradients(projection, the_op("triton"), weights)
    for order in range(2):
        with red_zones.around_outputs(), Trace(order):
            again = gradients(red_zones.guarded(projection), the_op("triton"), weights)
        assert all(torch.equal(again[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_any_strides_give_the_same_bits(dtype):
    projection = make("m33-n70-k40-e3-r7-softmax", cases.DTYPES[dtype])
    arguments = backward_arguments(projection)
    arguments[-1][1:3] = False, False  # those of the base are PyTorch's
    expected = launch.mogu_linear_backward(*arguments)
    spread = red_zones.strided(projection)
    found = [spread_out(tensor) for tensor in arguments[:4]]
    ours = launch.mogu_linear_backward(*found, *spread.operands().values(), arguments[-1])
    for mine, grad in zip(ours, expected, strict=True):
        assert mine is grad is None or torch.equal(mine, grad)


def backward_arguments(projection):
    """Arguments of a `mogu_linear_backward`, with everything wanted."""
    of_y, of_gates = upstream(projection)
    p, wide = projection, projection.gate_bias.dtype
    gates, ranks = eager.gates_and_ranks(p.x, p.lora_A, p.gate_weight, p.gate_bias, p.gate)
    wanted = [getattr(p, name) is not None for name in OPERANDS]
    upstreams = (of_y.to(p.x.dtype), of_gates.to(wide))
    return [*upstreams, gates, ranks, *p.operands().values(), wanted]


def spread_out(tensor):
    """The same values between NaN, columns first."""
    wide = torch.full((*reversed(tensor.shape), 2), float("nan"), dtype=tensor.dtype)
    return wide[..., 1].permute(*reversed(range(tensor.ndim))).copy_(tensor)


@pytest.mark.parametrize("backend", ["eager", cases.CPP, "triton"])
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_no_tokens_give_gradients_of_zero(backend, gate):
    projection = oracle.random(M=0, N=9, K=20, E=2, rank=3, dtype=torch.float32, gate=gate)
    ours = gradients(projection, the_op(backend), upstream(projection))
    for name, grad in ours.items():
        assert grad.shape == getattr(projection, name).shape
        assert not grad.any()


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_loss_of_the_gates_alone_has_gradients(backend):
    projection = make("m70-n65-k131-e2-r8", torch.float32)
    weights = upstream(projection)
    truth = gradients(projection.double(), the_formula, (weights[0] * 0, weights[1]))
    leaves = [
        t.requires_grad_() for t in (projection.x, projection.gate_weight, projection.gate_bias)
    ]
    _, gates = the_op(backend)(projection)
    grads = torch.autograd.grad((gates * weights[1]).sum(), leaves)
    for grad, name in zip(grads, ("x", "gate_weight", "gate_bias"), strict=True):
        torch.testing.assert_close(grad.double(), truth[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_split_router_has_the_gradient_of_the_whole_one_in_both_parts(backend):
    projection = make("m33-n70-k40-e3-r7-softmax", torch.bfloat16)
    projection.gate, weights = "sigmoid", upstream(projection)
    split = oracle.Projection(**projection.operands())
    split.gate_weight = split_gate_weight(projection.gate_weight, torch.bfloat16)
    whole = gradients(projection, the_op(backend), weights)
    parts = gradients(split, the_op(backend), weights)
    for part in parts["gate_weight"].float():
        torch.testing.assert_close(part, whole["gate_weight"], rtol=2**-7, atol=2e-3)
    torch.testing.assert_close(parts["x"], whole["x"], rtol=2**-7, atol=2e-2)


def test_a_gradient_of_a_gradient_is_refused():
    projection = make("m33-n70-k40-e3-r7-softmax", torch.float32)
    x = projection.x.requires_grad_()
    (grad,) = torch.autograd.grad(the_op()(projection)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["eager", cases.CPP, "triton"])
def test_opcheck_passes(backend):
    projection = oracle.random(M=5, N=7, K=9, E=2, rank=3, dtype=torch.float32, routed=True)
    wanted = backward_arguments(projection)
    torch.library.opcheck(torch.ops.mogu.mogu_linear_backward.default, (*wanted, backend))
    for name in OPERANDS:
        getattr(projection, name).requires_grad_()
    args = (*projection.operands().values(), True, backend, "", True)
    torch.library.opcheck(torch.ops.mogu.mogu_linear.default, args)


def test_a_compiled_training_step_has_the_same_gradients():
    projection = make("m33-n70-k40-e3-r7-softmax", torch.float32)
    weights = upstream(projection)
    expected = gradients(projection, the_op(), weights)
    torch._dynamo.reset()
    compiled = torch.compile(the_op(), backend="aot_eager", fullgraph=True)
    ours = gradients(projection, compiled, weights)
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad)


def test_an_exported_module_keeps_nothing():
    module, x = mk.MoGULinear(24, 40), torch.randn(5, 24)
    graph = torch.export.export(module, (x,)).graph
    calls = [node for node in graph.nodes if "mogu_linear" in str(node.target)]
    assert len(calls) == 1
    assert True not in calls[0].args[10:]


def test_a_module_learns_through_every_parameter():
    torch.manual_seed(0)
    module, x, target = (
        mk.MoGULinear(24, 40, router="mlp"),
        torch.randn(16, 24),
        torch.randn(16, 40),
    )
    with torch.no_grad():
        nn.init.normal_(module.lora_B)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append((module(x) - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4


def battery() -> None:
    """Gradients of both gates, with a mask, ranks in chunks and padding everywhere, judged."""
    for gate in ("sigmoid", "softmax"):
        projection = make("m70-n65-k131-e2-r8", torch.float64)
        projection.gate = gate
        changed = red_zones.strided(red_zones.guarded(projection))
        arguments = backward_arguments(projection)
        truth = eager.mogu_linear_backward(*arguments)
        tensors = [spread_out(tensor) for tensor in arguments[:4]]
        with red_zones.around_outputs(), Trace():
            ours = launch.mogu_linear_backward(
                *tensors, *changed.operands().values(), arguments[-1]
            )
        for mine, grad in zip(ours, truth, strict=True):
            torch.testing.assert_close(mine, grad, rtol=0, atol=1e-9)


def test_the_battery_passes_on_the_real_kernels():
    battery()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on red zones
@pytest.mark.parametrize("fault", mutants.BACKWARD_FAULTS)
def test_a_mutant_dies(fault):
    (file,) = mutants.files_of(fault)
    with mutants.mutant(fault, file), pytest.raises((AssertionError, InterpreterError)):
        battery()
