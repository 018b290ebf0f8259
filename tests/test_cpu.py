"""The C++ backend against fp64, on every instruction set that this processor has."""

import subprocess
import sys

import pytest
import torch

from mogu_kernels import cpu, ops
from tests import batteries, cases, oracle, red_zones

pytestmark = pytest.mark.skipif(
    not cpu.instruction_sets(), reason="the C++ backend was not built here"
)

SETS = ("avx512bf16", "avx512", "avx2", "portable")
all_sets = pytest.mark.parametrize(
    "isa",
    [
        pytest.param(
            isa,
            marks=pytest.mark.skipif(
                isa not in cpu.instruction_sets(), reason=f"this processor has no {isa}"
            ),
        )
        for isa in SETS
    ],
)
all_dtypes = pytest.mark.parametrize("dtype", cases.DTYPES)
all_shapes = pytest.mark.parametrize(
    "shape",
    [
        *cases.SHAPES,
        "m2-n9-k40-e2-r8",
        "m3-n70-k1-e2-r3-softmax",
        "m13-n33-k600-e2-r8",
    ],
)
MORE = {
    "m2-n9-k40-e2-r8": (2, 9, 40, 2, 8, "sigmoid", True, True),
    "m3-n70-k1-e2-r3-softmax": (3, 70, 1, 2, 3, "softmax", True, False),
    "m13-n33-k600-e2-r8": (13, 33, 600, 2, 8, "sigmoid", False, False),
}


@pytest.fixture(autouse=True)
def shapes(monkeypatch):
    """More shapes, named as the others: two tokens, one column of K, more K than one run."""
    for name, sizes in MORE.items():
        monkeypatch.setitem(cases.SHAPES, name, sizes)


FORMS = {"tiled": 10**6, "blocked": 0}  # few tokens or many, whatever M is
both_forms = pytest.mark.parametrize("form", FORMS)


def run(projection, isa, form):
    forced = {"isa": isa, "most": FORMS[form]}
    return cpu.mogu_linear(**projection.operands(), return_gates=True, **forced)


@all_sets
@all_dtypes
@all_shapes
@both_forms
def test_random_operands_match_fp64_within_three_gates(shape, dtype, isa, form):
    projection = cases.projection(shape, dtype)
    y, gates = run(projection, isa, form)
    oracle.assert_matches(actual=y, projection=projection, gates=gates)


@all_sets
@all_dtypes
@all_shapes
@both_forms
def test_integers_are_bitwise_exact(shape, dtype, isa, form):
    projection = cases.projection(shape, dtype, make=oracle.integers)
    y, _ = run(projection, isa, form)
    oracle.assert_exact(actual=y, projection=projection)


@all_sets
@all_dtypes
@both_forms
def test_operands_between_red_zones_and_at_odd_addresses_give_the_same_bits(dtype, isa, form):
    projection = cases.projection("m33-n40-k129-e3-r5-routed", dtype)
    y, _ = run(projection, isa, form)
    assert torch.equal(y, run(red_zones.guarded(projection), isa, form)[0])
    assert torch.equal(y, run(red_zones.strided(projection), isa, form)[0])


@all_sets
@all_dtypes
@both_forms
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_a_gated_mlp_matches_fp64(dtype, isa, form, activation):
    for shape in ("m17-n136-k72-e2-r8-softmax", "m33-n40-k129-e3-r5-routed"):
        p = cases.projection(shape, dtype)
        q = cases.twin(p, 1)
        lists = {name: [getattr(p, name), getattr(q, name)] for name in batteries.OPERANDS}
        lists["bias"] = [] if p.bias is None else lists["bias"]
        y, gates = cpu.gated_mlp(
            p.x,
            **lists,
            scaling=p.scaling,
            gate=p.gate,
            activation=activation,
            routed=p.routed,
            return_gates=True,
            isa=isa,
            most=FORMS[form],
        )
        oracle.assert_mlp_matches(actual=y, gate_proj=p, up_proj=q, activation=activation)
        for own, projection in zip(gates, (p, q), strict=True):
            true = oracle.true_gates(projection)
            torch.testing.assert_close(own.double(), true, rtol=0, atol=2e-5)


def shrink(projection, isa, form):
    """Shrunk [M, E * r], total [M] and gates [M, E]."""
    p = projection
    lists = ([p.lora_A], [p.gate_weight], [p.gate_bias])
    out = cpu.shrink_gate(
        p.x, *lists, p.scaling, p.gate, p.routed, isa=isa, most=FORMS[form]
    )  # fmt: skip
    return tuple(tensor[0] for tensor in out)


@all_sets
@all_dtypes
@all_shapes
@both_forms
def test_shrink_and_gate_match_fp64(shape, dtype, isa, form):
    projection = cases.projection(shape, dtype)
    shrunk, total, gates = shrink(projection, isa, form)
    oracle.assert_shrunk(shrunk=shrunk, total=total, gates=gates, projection=projection)
    for change in (red_zones.guarded, red_zones.strided):
        assert torch.equal(shrunk, shrink(change(projection), isa, form)[0])


@all_sets
@all_dtypes
@all_shapes
def test_gate_and_expand_in_place_match_fp64(shape, dtype, isa):
    projection = cases.projection(shape, dtype)
    shrunk, total, _ = shrink(projection, isa, "tiled")
    base = projection.x @ projection.weight.T
    wide = torch.full((base.shape[0], base.shape[1] + 5), float("nan"), dtype=base.dtype)
    y = wide[:, 3:-2].copy_(base)  # rows that do not follow each other, at odd addresses
    for strided in (False, True):
        own = red_zones.strided(projection) if strided else projection
        y.copy_(base)
        cpu.gated_expand_(y, shrunk, total, own.lora_B, own.bias, isa=isa)
        oracle.assert_expanded(
            actual=y, base=base, shrunk=shrunk, total=total, lora_B=own.lora_B, bias=own.bias
        )
    assert wide[:, :3].isnan().all()
    assert wide[:, -2:].isnan().all()
    columns = base.T.contiguous().T  # no contiguous last axis: a copy goes back
    cpu.gated_expand_(columns, shrunk, total, projection.lora_B, projection.bias, isa=isa)
    assert torch.equal(columns, y)


@all_dtypes
@both_forms
def test_unrouted_rows_are_the_plain_projection_to_the_bit(dtype, form):
    projection = cases.projection("m33-n40-k129-e3-r5-routed", dtype)
    isa = cpu.instruction_sets()[0]
    y, _ = run(projection, isa, form)
    routed, plain = projection.routed, oracle.Projection(**projection.operands())
    plain.routed = torch.zeros_like(routed)
    plain.lora_A, plain.lora_B = plain.lora_A * 0, plain.lora_B * 0
    unrouted, _ = run(plain, isa, form)
    assert torch.equal(y[~routed], unrouted[~routed])
    assert not torch.equal(y[routed], unrouted[routed])


@pytest.mark.parametrize("threads", [1, 2, 5])
@both_forms
def test_any_number_of_threads_gives_the_same_bits(threads, form):
    projection = cases.projection("m33-n40-k129-e3-r5-routed", "bf16")
    y, _ = run(projection, cpu.instruction_sets()[0], form)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(y, run(projection, cpu.instruction_sets()[0], form)[0])
    finally:
        torch.set_num_threads(before)


@all_dtypes
@both_forms
def test_nan_stays_in_its_row(dtype, form):
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", dtype)
    isa = cpu.instruction_sets()[0]
    clean, _ = run(projection, isa, form)
    projection.x[3, 5] = float("nan")
    dirty, _ = run(projection, isa, form)
    others = torch.arange(17) != 3
    assert dirty[3].isnan().all()
    assert torch.equal(dirty[others], clean[others])


@all_sets
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@both_forms
def test_values_at_the_ends_of_the_range_are_rounded_as_pytorch_rounds(dtype, isa, form):
    """One column of ones and one token: y is the weight, times a gate of one."""
    dtype = cases.DTYPES[dtype]
    small, large = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    values = torch.tensor([0.0, 1.0, -2.5, large, -large, small, small / 4, 3e-41, float("inf")])
    weight = values.to(dtype)[:, None].repeat(5, 1)
    projection = oracle.random(M=1, N=45, K=1, E=1, rank=1, dtype=dtype, bias=False)
    projection.x, projection.weight = torch.ones(1, 1, dtype=dtype), weight
    projection.routed = torch.zeros(1, dtype=torch.bool)
    y, _ = run(projection, isa, form)
    tolerated = torch.finfo(dtype).smallest_normal  # pairs of bf16 flush what is below to zero
    close = (y[0].float() - weight[:, 0].float()).abs() <= tolerated
    assert (close | (y[0] == weight[:, 0])).all()


def test_empty_outputs_work():
    for M, N in ((0, 7), (5, 0)):
        p = oracle.random(M=M, N=N, K=9, E=2, rank=3, dtype=torch.float32)
        y, gates = ops.mogu_linear(**p.operands(), backend="cpu", return_gates=True)
        assert (y.shape, gates.shape) == ((M, N), (M, 2))


@both_forms
def test_no_features_leave_the_bias(form):
    bias, total = torch.arange(24.0), torch.full((40, 1), 1.0)
    operands = (torch.empty(40, 0), torch.empty(24, 0), bias, torch.empty(2, 3, 0))
    rest = (torch.ones(2, 24, 3), torch.empty(2, 0), torch.zeros(2))
    y, _ = cpu.mogu_linear(
        *operands, *rest, [1.0, 1.0], "sigmoid", None, False, most=FORMS[form]
    )  # fmt: skip
    assert torch.equal(y, total * bias)


@torch.no_grad()
def test_the_short_way_leaves_tensors_without_memory_and_dual_numbers_alone(spied):
    p = cases.projection("m17-n136-k72-e2-r8-softmax", "f32")
    zeros = torch._efficientzerotensor(p.x.shape)
    y = ops.mogu_linear(**p.operands() | {"x": zeros})
    assert spied[0] is None
    torch.testing.assert_close(y, ops.mogu_linear(**p.operands() | {"x": torch.zeros_like(p.x)}))
    assert ops.library.is_direct("auto", p.x)
    with torch.autograd.forward_ad.dual_level():
        assert not ops.library.is_direct("auto", p.x)


def test_auto_takes_the_backend_and_falls_back_without_it(monkeypatch):
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", "bf16")
    y = ops.mogu_linear(**projection.operands())
    assert torch.equal(y, ops.mogu_linear(**projection.operands(), backend="cpu"))
    monkeypatch.setattr(cpu, "instruction_sets", tuple)
    eager = ops.mogu_linear(**projection.operands())
    assert torch.equal(eager, ops.mogu_linear(**projection.operands(), backend="eager"))
    with pytest.raises(ValueError, match='backend="cpu" was not built'):
        ops.mogu_linear(**projection.operands(), backend="cpu")


def test_what_it_does_not_take_is_named():
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", "f32")
    with pytest.raises(TypeError, match=r"float64: the cpu kernels take fp32, fp16 and bf16"):
        ops.mogu_linear(**projection.double().operands(), backend="cpu")
    with pytest.raises(ValueError, match="isa='sse9': this processor does not have it"):
        cpu.mogu_linear(**projection.operands(), return_gates=False, isa="sse9")
    with pytest.raises(ValueError, match="does not take these operands"):
        cpu.mogu_linear(**projection.double().operands(), return_gates=False)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_gates_are_fp32_whatever_the_default_dtype_is(default):
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", "bf16")
    torch.set_default_dtype(default)
    try:
        y, gates = run(projection, cpu.instruction_sets()[0], "tiled")
    finally:
        torch.set_default_dtype(torch.float32)
    assert gates.dtype == torch.float32
    oracle.assert_matches(actual=y, projection=projection, gates=gates)


@pytest.fixture
def spied(monkeypatch):
    """What the short way answered, call by call."""
    answers, real = [], cpu.project

    def project(*args, **kwargs):
        answers.append(real(*args, **kwargs))
        return answers[-1]

    monkeypatch.setattr(cpu, "project", project)
    return answers


@torch.no_grad()
def test_the_short_way_without_gradients_gives_the_bits_of_the_long_one(spied):
    projection = cases.projection("m33-n40-k129-e3-r5-routed", "bf16")
    y, gates = ops.mogu_linear(**projection.operands(), return_gates=True)
    assert spied[0] is not None
    assert spied[0][0] is y
    long, all_gates = run(projection, cpu.instruction_sets()[0], "blocked")
    assert torch.equal(y, long)
    assert torch.equal(gates, all_gates)
    alone = ops.mogu_linear(**projection.operands())
    assert torch.equal(alone, y)
    assert spied[-1][1] is None


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the ops that are dispatched."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", ()), str(function)]
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_whoever_watches_ops_sees_this_one():
    operands = cases.projection("m17-n136-k72-e2-r8-softmax", "f32").operands()
    with Operators() as mode:
        y = ops.mogu_linear(**operands)
    assert "mogu.mogu_linear.default" in mode.names
    with torch.profiler.profile() as profile:
        ops.mogu_linear(**operands)
    assert "mogu::mogu_linear" in {event.key for event in profile.key_averages()}
    compiled = torch.compile(
        lambda x: ops.mogu_linear(**operands | {"x": x}), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(operands["x"]), y)
    traced = torch.jit.trace(lambda x: ops.mogu_linear(**operands | {"x": x}), operands["x"])
    assert torch.equal(
        traced(operands["x"] * 2), ops.mogu_linear(**operands | {"x": operands["x"] * 2})
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.mogu_linear(**operands).dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda t: t[:, 1:]),
        ("weight", lambda t: t[:, :-1]),
        ("weight", lambda t: t[:-1]),
        ("weight", lambda t: t.double()),
        ("bias", lambda t: torch.ones(39)),
        ("lora_A", lambda t: t[0]),
        ("lora_B", lambda t: t[:, :, 1:]),
        ("gate_weight", lambda t: t.half()),
        ("gate_bias", lambda t: t[:1]),
        ("gate", lambda t: "softmin"),
        ("scaling", lambda t: [1.0]),
        ("routed", lambda t: torch.ones(5, dtype=torch.bool)),
        ("routed", lambda t: torch.ones(33)),
    ],
)
def test_the_short_way_declines_what_the_checks_refuse(name, change, spied):
    operands = cases.projection("m33-n40-k129-e3-r5-routed", "f32").operands()
    operands[name] = change(operands[name])
    with pytest.raises((ValueError, TypeError)):
        ops.mogu_linear(**operands)
    assert spied == [None]


def test_tensors_that_are_more_than_tensors_go_the_long_way(spied):
    class Named(torch.Tensor):
        pass

    operands = cases.projection("m17-n136-k72-e2-r8-softmax", "f32").operands()
    with torch.no_grad():
        expected = ops.mogu_linear(**operands)
        operands["weight"] = operands["weight"].as_subclass(Named)
        assert torch.equal(ops.mogu_linear(**operands).as_subclass(torch.Tensor), expected)
    assert spied[1] is None


def test_running_out_of_memory_is_an_error():
    code = """
import resource, torch
from mogu_kernels import cpu, ops
torch.set_num_threads(2)
def call(M, K, most):
    x = torch.ones(1, K).expand(M, K)
    A, B = torch.ones(2, 1, K), torch.ones(2, 1, 1)
    operands = (x, torch.ones(1, K), None, A, B, torch.ones(2, K), torch.ones(2))
    return cpu.mogu_linear(*operands, [1.0, 1.0], "sigmoid", None, False, most=most)
call(3, 9, 0)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for most in (0, 10**9):
    try:
        call(2**17, 2**12, most)
    except MemoryError as error:
        print(error)
call(3, 9, 0)
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        *["the CPU backend found no memory for its work space"] * 2,
        "alive",
    ]
