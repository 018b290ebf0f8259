"""The one way a routed projection is judged: exact where it can be, RMS, and every component.

The truth is the formula in fp64, written here with no code of the package. Three gates stand
together, since each lets something through that another catches:

1. `assert_exact`: small integers, gates of exactly 1/2: bitwise equal.
2. RMS error at most that of plain PyTorch in the same dtype, which is given the fold and fp32 gates
   (fp32: the maximal error at most twice PyTorch's).
3. Every component within a bound derived from its own operands.
"""

import dataclasses

import torch
from torch import Tensor

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
EPSILON = 2.0**-24


@dataclasses.dataclass(kw_only=True)
class Projection:
    """The operands of one `mogu_linear`, named as there."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    gate_weight: Tensor
    gate_bias: Tensor
    scaling: list[float]
    gate: str = "sigmoid"
    routed: Tensor | None = None

    def operands(self) -> dict:
        """As keyword arguments."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def double(self) -> "Projection":
        """Every operand in fp64, the parts of a split router added up."""
        wide = {
            name: value.double()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in self.operands().items()
        }
        if wide["gate_weight"].ndim == 3:
            wide["gate_weight"] = wide["gate_weight"].sum(0)
        return Projection(**wide)


def true_gates(p: Projection) -> Tensor:
    """[M, E] in fp64."""
    p = p.double()
    logits = p.x @ p.gate_weight.T + p.gate_bias
    if p.gate == "softmax":
        return torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    return 1 / (1 + torch.exp(-logits))


def effective_gates(p: Projection) -> tuple[Tensor, Tensor]:
    """(total [M], gates [M, E]) as they act on y: (1, 0) where routing is off."""
    gates = true_gates(p)
    total = gates.sum(1)
    if p.routed is not None:
        total = torch.where(p.routed, total, torch.ones_like(total))
        gates = gates * p.routed[:, None]
    return total, gates


def truth(p: Projection) -> Tensor:
    """Y [M, N] in fp64."""
    total, gates = effective_gates(p)
    p = p.double()
    y = p.x @ p.weight.T
    if p.bias is not None:
        y = y + p.bias
    y = total[:, None] * y
    for e, s in enumerate(p.scaling):
        y = y + s * gates[:, e : e + 1] * ((p.x @ p.lora_A[e].T) @ p.lora_B[e].T)
    return y


def plain_pytorch(p: Projection) -> Tensor:
    """What a careful user writes in x's dtype, given the fold and fp32 gates."""
    dtype = p.x.dtype
    gate_weight = p.gate_weight if p.gate_weight.ndim == 2 else p.gate_weight.float().sum(0)
    logits = torch.nn.functional.linear(p.x.float(), gate_weight, p.gate_bias)
    gates = logits.softmax(1) if p.gate == "softmax" else logits.sigmoid()
    total = gates.sum(1)
    if p.routed is not None:
        total = torch.where(p.routed, total, 1)
        gates = gates * p.routed[:, None]
    y = total.to(dtype)[:, None] * torch.nn.functional.linear(p.x, p.weight, p.bias)
    for e, s in enumerate(p.scaling):
        expert = (p.x @ p.lora_A[e].T) @ p.lora_B[e].T
        y = y + (s * gates[:, e : e + 1]).to(dtype) * expert
    return y


def bound(p: Projection) -> Tensor:
    """How far each component of y may be from the truth, [M, N]."""
    unit = UNIT[p.x.dtype]
    slack = 4 * p.x.shape[1] ** 0.5 * EPSILON
    ref, (_, gates) = truth(p).abs(), effective_gates(p)
    p = p.double()
    x = p.x.abs()
    logit_error = (slack * x @ p.gate_weight.abs().T).amax(1, keepdim=True)
    total = unit * ref + slack * x @ p.weight.abs().T
    for e, s in enumerate(p.scaling):
        h = (p.x @ p.lora_A[e].T).abs()
        rank_error = unit * h + slack * x @ p.lora_A[e].abs().T
        gate_error = (8 * EPSILON + 2 * logit_error) * h
        total = total + s * gates[:, e : e + 1] * ((rank_error + gate_error) @ p.lora_B[e].abs().T)
    return (1 + unit) * total


ACTIVATIONS = {
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / 2**0.5)),
    "gelu_tanh": lambda z: (
        0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    ),
}
STEEPEST = 1.13  # slope of any of them


def assert_mlp_matches(
    *, actual: Tensor, gate_proj: Projection, up_proj: Projection, activation: str
) -> None:
    """Gates 2 and 3 on activation(gate_proj) * up_proj; both projections have the same x."""
    act, unit = ACTIVATIONS[activation], UNIT[gate_proj.x.dtype]
    p, q = truth(gate_proj), truth(up_proj)
    ref = act(p) * q
    assert actual.shape == ref.shape, f"y is {list(actual.shape)}, not {list(ref.shape)}"
    assert actual.dtype == gate_proj.x.dtype
    assert torch.isfinite(actual).all(), "y has elements that are NaN, Inf or never stored"
    error = (actual.double() - ref).abs()
    dp, dq = bound(gate_proj), bound(up_proj)
    allowed = unit * ref.abs() + STEEPEST * dp * (q.abs() + dq) + act(p).abs() * dq
    excess = error / allowed
    worst = divmod(int(excess.argmax()), excess.shape[1])
    assert excess.max() <= 1, (
        f"y{list(worst)} = {actual[worst]:.6g}, not {ref[worst]:.6g}: "
        f"{excess.max():.3g} times the bound; {int((excess > 1).sum())} of {excess.numel()} off"
    )
    plain = _plain_act(activation)(plain_pytorch(gate_proj)) * plain_pytorch(up_proj)
    plain = (plain.double() - ref).abs()
    if actual.dtype == torch.float32:
        assert error.max() <= 2 * plain.max(), f"{error.max() / plain.max():.3g}x PyTorch's max"
    else:
        ratio = float(error.square().mean().sqrt() / plain.square().mean().sqrt())
        assert ratio <= 1, f"RMS error is {ratio:.3g}x plain PyTorch's"


def _plain_act(activation: str):
    """What a careful user writes."""
    F = torch.nn.functional
    if activation == "silu":
        return F.silu
    return lambda z: F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def assert_matches(*, actual: Tensor, projection: Projection, gates: Tensor | None = None) -> None:
    """Gates 2 and 3 on y, and the gates themselves where given."""
    ref = truth(projection)
    assert actual.shape == ref.shape, f"y is {list(actual.shape)}, not {list(ref.shape)}"
    assert actual.dtype == projection.x.dtype
    assert torch.isfinite(actual).all(), "y has elements that are NaN, Inf or never stored"
    error = (actual.double() - ref).abs()
    excess = error / bound(projection).clamp_min(torch.finfo(torch.float64).tiny)
    if error.numel():
        worst = divmod(int(excess.argmax()), excess.shape[1])
        assert excess.max() <= 1, (
            f"y{list(worst)} = {actual[worst]:.6g}, not {ref[worst]:.6g}: "
            f"{excess.max():.3g} times the bound; {int((excess > 1).sum())} of {excess.numel()} off"
        )
        plain = (plain_pytorch(projection).double() - ref).abs()
        if projection.x.dtype == torch.float32:
            assert error.max() <= 2 * plain.max(), f"{error.max() / plain.max():.3g}x PyTorch's max"
        else:
            ratio = float(error.square().mean().sqrt() / plain.square().mean().sqrt())
            assert ratio <= 1, f"RMS error is {ratio:.3g}x plain PyTorch's"
    if gates is not None:
        torch.testing.assert_close(gates.double(), true_gates(projection), rtol=0, atol=2e-5)


def assert_exact(*, actual: Tensor, projection: Projection) -> None:
    """Gate 1: for operands from `integers`, bitwise equality with fp64."""
    ref = truth(projection)
    assert ref.abs().max() <= 256, "the case is too large to be exact"
    wrong = (actual.double() != ref).nonzero()
    assert not len(wrong), f"{len(wrong)} elements differ, first at {wrong[0].tolist()}"


def random(
    *, M, N, K, E, rank, dtype, gate="sigmoid", bias=True, routed=False, seed=0
) -> Projection:
    """Gaussian operands of unit scale; every expert and scaling visibly different."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    return Projection(
        x=normal(M, K).to(dtype),
        weight=(normal(N, K) * K**-0.5).to(dtype),
        bias=normal(N).to(dtype) if bias else None,
        lora_A=(normal(E, rank, K) * K**-0.5).to(dtype),
        lora_B=(normal(E, N, rank) * max(rank, 1) ** -0.5).to(dtype),
        gate_weight=normal(E, K) * K**-0.5,
        gate_bias=normal(E),
        scaling=[2.0 - 0.25 * e for e in range(E)],
        gate=gate,
        routed=torch.rand(M, generator=g) < 0.6 if routed else None,
    )


def integers(
    *, M, N, K, E, rank, dtype, gate="sigmoid", bias=True, routed=False, seed=0
) -> Projection:
    """Sparse integers in -2..2 and router weights of 0: every intermediate is exact in `dtype`."""
    g = torch.Generator().manual_seed(seed)

    def sparse(*shape, per_row):
        values = torch.randint(-2, 3, shape, generator=g)
        keep = torch.rand(shape, generator=g) < per_row / shape[-1]
        return (values * keep).to(dtype)

    uniform = gate == "softmax" and E & (E - 1)
    assert not uniform, "softmax gates of 1/E are exact for E a power of two only"
    return Projection(
        x=sparse(M, K, per_row=6),
        weight=sparse(N, K, per_row=6),
        bias=sparse(N, per_row=2),
        lora_A=sparse(E, rank, K, per_row=3),
        lora_B=sparse(E, N, rank, per_row=1),
        gate_weight=torch.zeros(E, K),
        gate_bias=torch.zeros(E),
        scaling=[float(2 ** (e % 2)) for e in range(E)],
        gate=gate,
        routed=torch.rand(M, generator=g) < 0.6 if routed else None,
    )


def assert_expanded(
    *, actual: Tensor, base: Tensor, shrunk: Tensor, total: Tensor, lora_B: Tensor, bias
) -> None:
    """`gated_expand_` of `base`, rounded once."""
    E, N, rank = lora_B.shape
    B = lora_B.double().transpose(1, 2).reshape(E * rank, N)
    wide = base.double() + (0 if bias is None else bias.double())
    ref = total.double()[:, None] * wide + shrunk.double() @ B
    summed = total.double()[:, None] * wide.abs() + shrunk.double().abs() @ B.abs()
    allowed = UNIT[actual.dtype] * ref.abs() + 4 * (E * rank + 2) * EPSILON * summed
    assert ((actual.double() - ref).abs() <= allowed).all()


def assert_shrunk(*, shrunk: Tensor, total: Tensor, gates: Tensor, projection: Projection) -> None:
    """`shrink_gate`: gates to 2e-5, s * gate * (x A^T) rounded once."""
    all_gates, (wide_total, wide_gates) = true_gates(projection), effective_gates(projection)
    torch.testing.assert_close(gates.double(), all_gates, rtol=0, atol=2e-5)
    torch.testing.assert_close(total.double(), wide_total, rtol=0, atol=2e-5 * len(gates[0]))
    p = projection.double()
    scaled = torch.stack([s * wide_gates[:, e] for e, s in enumerate(p.scaling)], 1)[:, :, None]
    ref = scaled * torch.einsum("mk,erk->mer", p.x, p.lora_A)
    summed = scaled.abs() * torch.einsum("mk,erk->mer", p.x.abs(), p.lora_A.abs())
    slack = 4 * p.x.shape[1] ** 0.5 * EPSILON + 4e-5
    allowed = UNIT[shrunk.dtype] * ref.abs() + slack * summed + 1e-7
    assert ((shrunk.double() - ref.flatten(1)).abs() <= allowed.flatten(1)).all()
