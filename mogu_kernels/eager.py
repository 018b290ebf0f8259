"""The routed projection as a short composition of PyTorch calls: fallback, and gradients.

Shapes: x [M, K], weight [N, K], bias [N], lora_A [E, r, K], lora_B [E, N, r], gate_weight [E, K]
(or [2, E, K], a high and a low part), gate_bias [E], scaling: E floats, routed: bool [M].
Everything is computed in fp32 (fp64 for fp64 inputs) and rounded once.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def shrink_gate(
    x: Tensor,
    lora_A: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    scaling: list[float],
    gate: str,
    routed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated ranks [M, E * r], total gates [M] and gates [M, E], all in the accumulation dtype."""
    gates, ranks = gates_and_ranks(x, lora_A, gate_weight, gate_bias, gate)
    factors, total = _acting(gates, lora_A.shape[1], scaling, routed)
    return ranks * factors, total, gates


def gates_and_ranks(
    x: Tensor, lora_A: Tensor, gate_weight: Tensor, gate_bias: Tensor, gate: str
) -> tuple[Tensor, Tensor]:
    """Gates [M, E] and ranks A_e x [M, E * r], before either acts on the other."""
    h = _accumulate(x)
    logits = F.linear(h, _joined(gate_weight, h.dtype), gate_bias.to(h.dtype))
    gates = logits.sigmoid() if gate == "sigmoid" else logits.softmax(-1)
    return gates, shrink(h, lora_A)


def shrink(x: Tensor, lora_A: Tensor) -> Tensor:
    """Ranks A_e x [M, E * r]."""
    h = _accumulate(x)
    return F.linear(h, lora_A.to(h.dtype).flatten(0, 1))


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, shrunk: Tensor, total: Tensor, lora_B: Tensor
) -> Tensor:
    """Y [M, N] in x's dtype from the gated ranks and total gates of x."""
    h = _accumulate(x)
    y = F.linear(h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype))
    return _expanded(y.mul_(total[:, None]), shrunk, lora_B).to(x.dtype)


def gated_expand(
    y: Tensor, shrunk: Tensor, total: Tensor, lora_B: Tensor, bias: Tensor | None
) -> Tensor:
    """The same from a base projection y [M, N] that something else has computed."""
    wide = _accumulate(y) if bias is None else _accumulate(y) + bias
    return _expanded(wide * total[:, None], shrunk, lora_B).to(y.dtype)


def mogu_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    scaling: list[float],
    gate: str,
    routed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Y [M, N] in x's dtype and gates [M, E]."""
    operands = (x, weight, bias, lora_A, lora_B, gate_weight, gate_bias, scaling, gate, routed)
    return mogu_linear_for_backward(*operands)[:2]


def mogu_linear_for_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    scaling: list[float],
    gate: str,
    routed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Y [M, N] in x's dtype and, for `mogu_linear_backward`, gates [M, E] and ranks [M, E * r]."""
    h = _accumulate(x)
    gates, ranks = gates_and_ranks(h, lora_A, gate_weight, gate_bias, gate)
    factors, total = _acting(gates, lora_A.shape[1], scaling, routed)
    y = gated_linear(h, weight, bias, ranks * factors, total, lora_B)
    return y.to(x.dtype), gates, ranks


def gated_mlp(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    gate_weight: list[Tensor],
    gate_bias: list[Tensor],
    scaling: list[float],
    gate: str,
    activation: str,
    routed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """activation(gate_proj) * up_proj [M, N] in x's dtype and gates [2, M, E]; lists are pairs."""
    (gated, up), gates, _ = _both_projections(
        x, weight, bias, lora_A, lora_B, gate_weight, gate_bias, scaling, gate, routed
    )
    return (ACTIVATIONS[activation](gated) * up).to(x.dtype), torch.stack(gates)


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def gated_mlp_backward(
    grad_y: Tensor | None,
    grad_gates: Tensor | None,
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    gate_weight: list[Tensor],
    gate_bias: list[Tensor],
    scaling: list[float],
    gate: str,
    activation: str,
    routed: Tensor | None,
) -> list[Any]:
    """Gradients of the first seven arguments of `gated_mlp`; both projections are recomputed."""
    (gated, up), gates, ranks = _both_projections(
        x, weight, bias, lora_A, lora_B, gate_weight, gate_bias, scaling, gate, routed
    )
    dy = torch.zeros_like(up) if grad_y is None else grad_y.to(up.dtype)
    if activation == "silu":
        dgated = torch.ops.aten.silu_backward(dy * up, gated)
    else:
        kind = "tanh" if activation == "gelu_tanh" else "none"
        dgated = torch.ops.aten.gelu_backward(dy * up, gated, approximate=kind)
    pairs: list[Any] = []
    for j, dp in enumerate((dgated, dy * ACTIVATIONS[activation](gated))):
        own = (weight[j], bias[j] if bias else None, lora_A[j], lora_B[j])
        pairs.append(
            mogu_linear_backward(
                dp,
                None if grad_gates is None else grad_gates[j],
                gates[j],
                ranks[j],
                _accumulate(x),
                *own,
                gate_weight[j],
                gate_bias[j],
                scaling,
                gate,
                routed,
                wanted=[True] * 7,
            )
        )
    (dx_gate, *of_gate), (dx_up, *of_up) = pairs
    grads: list[Any] = [(dx_gate + dx_up).to(x.dtype)]
    for pair in zip(of_gate, of_up, strict=True):
        grads.append([grad for grad in pair if grad is not None])  # no bias, no gradient
    return grads


def _both_projections(x, weight, bias, *rest) -> list[list[Tensor]]:
    """gate_proj's and up_proj's [M, N], not rounded, their gates [M, E] and ranks [M, E * r]."""
    lora_A, lora_B, gate_weight, gate_bias, scaling, gate, routed = rest
    both = [
        mogu_linear_for_backward(
            _accumulate(x),
            weight[j],
            bias[j] if bias else None,
            lora_A[j],
            lora_B[j],
            gate_weight[j],
            gate_bias[j],
            scaling,
            gate,
            routed,
        )
        for j in range(2)
    ]
    return [list(each) for each in zip(*both, strict=True)]


def mogu_linear_backward(
    grad_y: Tensor | None,
    grad_gates: Tensor | None,
    gates: Tensor,
    ranks: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    scaling: list[float],
    gate: str,
    routed: Tensor | None,
    wanted: list[bool],
) -> list[Tensor | None]:
    """Gradients of the first seven arguments of `mogu_linear`, those that `wanted` asks for.

    With q = grad_y W and v_e = grad_y B_e (the transposes of base and expand), a gate's gradient is
    <grad_y, base> + scaling_e <v_e, A_e x>, where <grad_y, base> = q . x + grad_y . bias needs no
    second base GEMM, and is the same for all experts, so that a softmax does not see it. `gates`
    [M, E] and `ranks` [M, E * r] are what `mogu_linear_for_backward` returned.
    """
    h = _accumulate(x)
    dtype = h.dtype
    E, rank, _ = lora_A.shape
    want_x, want_w, want_bias, want_a, want_b, want_u, want_c = wanted
    factors, total = _acting(gates, rank, scaling, routed)
    dy = h.new_zeros(len(x), len(weight)) if grad_y is None else grad_y.to(dtype)
    v = dy @ _side_by_side(lora_B, dtype)
    dranks = v * factors

    dx = dw = dbias = da = db = du = dc = None
    if want_x or want_u or want_c:
        dgates = (v * ranks).unflatten(1, (E, rank)).sum(2).mul_(gates.new_tensor(scaling))
        q: Any = dy @ weight.to(dtype) if want_x or gate == "sigmoid" else None
        if gate == "sigmoid":
            dgates += torch.linalg.vecdot(q, h)[:, None]
            dgates += 0 if bias is None else (dy @ bias.to(dtype))[:, None]
        if routed is not None:
            dgates = torch.where(routed[:, None], dgates, 0.0)
        if grad_gates is not None:
            dgates += grad_gates
        if gate == "sigmoid":
            dlogits = dgates * gates * (1 - gates)
        else:
            dlogits = gates * (dgates - (gates * dgates).sum(1, keepdim=True))
        if want_x:  # both narrow products in one pass
            rows = torch.cat([lora_A.to(dtype).flatten(0, 1), _joined(gate_weight, dtype)])
            dx = q.mul_(total[:, None]).addmm_(torch.cat([dranks, dlogits], 1), rows)
        if want_u:
            du = dlogits.t() @ h
            du = du if gate_weight.ndim == 2 else torch.stack([du, du])  # the parts are added up
        dc = dlogits.sum(0) if want_c else None
    if want_a:
        da = (dranks.t() @ h).unflatten(0, (E, rank))
    if want_b:
        db = (dy.t() @ (ranks * factors)).unflatten(1, (E, rank)).transpose(0, 1)
    if want_w or want_bias:
        gated_dy = total[:, None] * dy
        dw = gated_dy.t() @ h if want_w else None
        dbias = gated_dy.sum(0) if want_bias else None
    like = (x, weight, bias, lora_A, lora_B, gate_weight, gate_bias)
    grads = (dx, dw, dbias, da, db, du, dc)
    return [
        None if grad is None or t is None else grad.to(t.dtype)
        for grad, t in zip(grads, like, strict=True)
    ]


def _acting(
    gates: Tensor, rank: int, scaling: list[float], routed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Factors scaling_e * gate_e of the ranks [M, E * r], total [M]; 0 and 1 where not routed."""
    total, factors = gates.sum(1), gates * gates.new_tensor(scaling)
    if routed is not None:
        total = torch.where(routed, total, 1.0)
        factors = torch.where(routed[:, None], factors, 0.0)
    return factors.repeat_interleave(rank, 1, output_size=rank * gates.shape[1]), total


def _accumulate(x: Tensor) -> Tensor:
    """Widen x to the dtype that sums are taken in: fp32, or fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _joined(gate_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """gate_weight as [E, K] in `dtype`, the parts of a split one added up."""
    gate_weight = gate_weight.to(dtype)
    return gate_weight if gate_weight.ndim == 2 else gate_weight.sum(0)


def _expanded(gated: Tensor, shrunk: Tensor, lora_B: Tensor) -> Tensor:
    """The gated base [M, N], which is changed, plus shrunk B, not rounded."""
    B = _side_by_side(lora_B, gated.dtype)
    return gated.addmm_(shrunk.to(gated.dtype), B.t())


def _side_by_side(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    """lora_B [E, N, r] as one [N, E * r]."""
    return lora_B.to(dtype).permute(1, 0, 2).flatten(1)
