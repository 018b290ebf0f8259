"""The C++ backend against fp64, on every instruction set that this processor has."""

import pytest
import torch

from mogu_kernels import cpu, ops
from tests import batteries, cases, oracle, red_zones

pytestmark = pytest.mark.skipif(
    not cpu.instruction_sets(), reason="the C++ backend was not built here"
)

SETS = ("avx512bf16", "avx512", "avx2", "portable")
all_sets = pytest.mark.parametrize("isa", SETS)
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


@pytest.fixture
def form(request, monkeypatch):
    """Few tokens or many, whatever M is."""
    most = 10**6 if request.param == "tiled" else 0
    monkeypatch.setattr(cpu, "MOST_TILED", dict.fromkeys(cpu.MOST_TILED, most))


both_forms = pytest.mark.parametrize("form", ["tiled", "blocked"], indirect=True)


def run(projection, isa, **kwargs):
    if isa not in cpu.instruction_sets():
        pytest.skip(f"this processor has no {isa}")
    kwargs = {"return_gates": True} | kwargs
    return cpu.mogu_linear(**projection.operands(), isa=isa, **kwargs)


@all_sets
@all_dtypes
@all_shapes
@both_forms
def test_random_operands_match_fp64_within_three_gates(shape, dtype, isa, form):
    projection = cases.projection(shape, dtype)
    y, gates = run(projection, isa)
    oracle.assert_matches(actual=y, projection=projection, gates=gates)


@all_sets
@all_dtypes
@all_shapes
@both_forms
def test_integers_are_bitwise_exact(shape, dtype, isa, form):
    projection = cases.projection(shape, dtype, make=oracle.integers)
    y, _ = run(projection, isa)
    oracle.assert_exact(actual=y, projection=projection)


@all_sets
@all_dtypes
@both_forms
def test_operands_between_red_zones_and_at_odd_addresses_give_the_same_bits(dtype, isa, form):
    projection = cases.projection("m33-n40-k129-e3-r5-routed", dtype)
    y, _ = run(projection, isa)
    assert torch.equal(y, run(red_zones.guarded(projection), isa)[0])
    assert torch.equal(y, run(red_zones.strided(projection), isa)[0])


@all_sets
@all_dtypes
@both_forms
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_a_gated_mlp_matches_fp64(dtype, isa, form, activation):
    if isa not in cpu.instruction_sets():
        pytest.skip(f"this processor has no {isa}")
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
        )
        oracle.assert_mlp_matches(actual=y, gate_proj=p, up_proj=q, activation=activation)
        for own, projection in zip(gates, (p, q), strict=True):
            true = oracle.true_gates(projection)
            torch.testing.assert_close(own.double(), true, rtol=0, atol=2e-5)


@all_dtypes
@both_forms
def test_unrouted_rows_are_the_plain_projection_to_the_bit(dtype, form):
    projection = cases.projection("m33-n40-k129-e3-r5-routed", dtype)
    isa = cpu.instruction_sets()[0]
    y, _ = run(projection, isa)
    routed, plain = projection.routed, oracle.Projection(**projection.operands())
    plain.routed = torch.zeros_like(routed)
    plain.lora_A, plain.lora_B = plain.lora_A * 0, plain.lora_B * 0
    unrouted, _ = run(plain, isa)
    assert torch.equal(y[~routed], unrouted[~routed])
    assert not torch.equal(y[routed], unrouted[routed])


@pytest.mark.parametrize("threads", [1, 2, 5])
@both_forms
def test_any_number_of_threads_gives_the_same_bits(threads, form):
    projection = cases.projection("m33-n40-k129-e3-r5-routed", "bf16")
    y, _ = run(projection, cpu.instruction_sets()[0])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(y, run(projection, cpu.instruction_sets()[0])[0])
    finally:
        torch.set_num_threads(before)


@all_dtypes
@both_forms
def test_nan_stays_in_its_row(dtype, form):
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", dtype)
    isa = cpu.instruction_sets()[0]
    clean, _ = run(projection, isa)
    projection.x[3, 5] = float("nan")
    dirty, _ = run(projection, isa)
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
    y, _ = run(projection, isa)
    tolerated = torch.finfo(dtype).smallest_normal  # pairs of bf16 flush what is below to zero
    close = (y[0].float() - weight[:, 0].float()).abs() <= tolerated
    assert (close | (y[0] == weight[:, 0])).all()


def test_empty_outputs_work():
    for M, N in ((0, 7), (5, 0)):
        p = oracle.random(M=M, N=N, K=9, E=2, rank=3, dtype=torch.float32)
        y, gates = ops.mogu_linear(**p.operands(), backend="cpu", return_gates=True)
        assert (y.shape, gates.shape) == ((M, N), (M, 2))


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
    with pytest.raises(TypeError, match="3 arguments, not"):
        cpu._cpu.run("portable", (0, 0, 0))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_gates_are_fp32_whatever_the_default_dtype_is(default):
    projection = cases.projection("m17-n136-k72-e2-r8-softmax", "bf16")
    torch.set_default_dtype(default)
    try:
        y, gates = run(projection, cpu.instruction_sets()[0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert gates.dtype == torch.float32
    oracle.assert_matches(actual=y, projection=projection, gates=gates)
