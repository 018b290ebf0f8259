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
    ranks, factors, total, gates = _routers_and_ranks(
        _accumulate(x), lora_A, gate_weight, gate_bias, scaling, gate, routed
    )
    return (ranks * factors[:, :, None]).flatten(1), total, gates


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
    h = _accumulate(x)
    shrunk, total, gates = shrink_gate(h, lora_A, gate_weight, gate_bias, scaling, gate, routed)
    return gated_linear(h, weight, bias, shrunk, total, lora_B).to(x.dtype), gates


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
    (gated, up), gates = _both_projections(
        x, weight, bias, lora_A, lora_B, gate_weight, gate_bias, scaling, gate, routed
    )
    return (ACTIVATIONS[activation](gated) * up).to(x.dtype), gates


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
    (gated, up), _ = _both_projections(
        x, weight, bias, lora_A, lora_B, gate_weight, gate_bias, scaling, gate, routed
    )
    dy = torch.zeros_like(up) if grad_y is None else grad_y.to(up.dtype)
    if activation == "silu":
        dgated = torch.ops.aten.silu_backward(dy * up, gated)
    else:
        kind = "tanh" if activation == "gelu_tanh" else "none"
        dgated = torch.ops.aten.gelu_backward(dy * up, gated, approximate=kind)
    pairs: list[Any] = [
        mogu_linear_backward(
            dp,
            None if grad_gates is None else grad_gates[j],
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
            wanted=[True] * 7,
        )
        for j, dp in enumerate((dgated, dy * ACTIVATIONS[activation](gated)))
    ]
    (dx_gate, *of_gate), (dx_up, *of_up) = pairs
    grads: list[Any] = [(dx_gate + dx_up).to(x.dtype)]
    for pair in zip(of_gate, of_up, strict=True):
        grads.append([grad for grad in pair if grad is not None])  # no bias, no gradient
    return grads


def _both_projections(x, weight, bias, *rest) -> tuple[list[Tensor], Tensor]:
    """gate_proj and up_proj [M, N], not rounded, and their gates [2, M, E]."""
    lora_A, lora_B, gate_weight, gate_bias, scaling, gate, routed = rest
    both = [
        mogu_linear(
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
    return [y for y, _ in both], torch.stack([gates for _, gates in both])


def mogu_linear_backward(
    grad_y: Tensor | None,
    grad_gates: Tensor | None,
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
    second base GEMM.
    """
    h = _accumulate(x)
    dtype = h.dtype
    E, rank, K = lora_A.shape
    lora_A_rows = lora_A.to(dtype).reshape(E * rank, K)
    ranks, factors, total, gates = _routers_and_ranks(
        h, lora_A, gate_weight, gate_bias, scaling, gate, routed
    )
    dy = h.new_zeros(x.shape[0], weight.shape[0]) if grad_y is None else grad_y.to(dtype)
    q = dy @ weight.to(dtype)
    v = (dy @ _side_by_side(lora_B, dtype)).unflatten(1, (E, rank))
    dy_base = (q * h).sum(1)
    if bias is not None:
        dy_base = dy_base + dy @ bias.to(dtype)
    dgates = dy_base[:, None] + (v * ranks).sum(2) * gates.new_tensor(scaling)
    if routed is not None:
        dgates = torch.where(routed[:, None], dgates, 0.0)
    if grad_gates is not None:
        dgates = dgates + grad_gates.to(dtype)
    if gate == "sigmoid":
        dlogits = dgates * gates * (1 - gates)
    else:
        dlogits = gates * (dgates - (gates * dgates).sum(1, keepdim=True))
    v = (v * factors[:, :, None]).flatten(1)

    want_x, want_w, want_bias, want_a, want_b, want_u, want_c = wanted
    gated_dy = total[:, None] * dy if want_w or want_bias else dy
    gated_ranks = (ranks * factors[:, :, None]).flatten(1)
    router = _joined(gate_weight, dtype)
    du = dlogits.t() @ h
    grads = [
        total[:, None] * q + v @ lora_A_rows + dlogits @ router if want_x else None,
        gated_dy.t() @ h if want_w else None,
        gated_dy.sum(0) if want_bias else None,
        (v.t() @ h).unflatten(0, (E, rank)) if want_a else None,
        (dy.t() @ gated_ranks).unflatten(1, (E, rank)).transpose(0, 1) if want_b else None,
        (du if gate_weight.ndim == 2 else du.expand(gate_weight.shape)) if want_u else None,
        dlogits.sum(0) if want_c else None,
    ]
    like = (x, weight, bias, lora_A, lora_B, gate_weight, gate_bias)
    return [
        None if grad is None or t is None else grad.to(t.dtype)
        for grad, t in zip(grads, like, strict=True)
    ]


def _routers_and_ranks(
    x: Tensor, lora_A, gate_weight, gate_bias, scaling, gate, routed
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ranks A_e x [M, E, r], factors scaling_e * gate_e [M, E], total [M] and gates [M, E]."""
    logits = F.linear(x, _joined(gate_weight, x.dtype), gate_bias.to(x.dtype))
    gates = logits.sigmoid() if gate == "sigmoid" else logits.softmax(-1)
    total, factors = gates.sum(1), gates * gates.new_tensor(scaling)
    if routed is not None:
        total = torch.where(routed, total, 1.0)
        factors = torch.where(routed[:, None], factors, 0.0)
    E, rank, K = lora_A.shape
    ranks = F.linear(x, lora_A.to(x.dtype).reshape(E * rank, K)).unflatten(1, (E, rank))
    return ranks, factors, total, gates


def _accumulate(x: Tensor) -> Tensor:
    """Widen x to the dtype that sums are taken in: fp32, or fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _joined(gate_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """gate_weight as [E, K] in `dtype`, the parts of a split one added up."""
    gate_weight = gate_weight.to(dtype)
    return gate_weight if gate_weight.ndim == 2 else gate_weight.sum(0)


def _expanded(gated: Tensor, shrunk: Tensor, lora_B: Tensor) -> Tensor:
    """The gated base [M, N] plus shrunk B, not rounded."""
    B = _side_by_side(lora_B, gated.dtype)
    return torch.addmm(gated, shrunk.to(gated.dtype), B.t())


def _side_by_side(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    """lora_B [E, N, r] as one [N, E * r]."""
    return lora_B.to(dtype).permute(1, 0, 2).flatten(1)
