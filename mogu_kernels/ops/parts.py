"""The routed projection in two steps, around any base: shrink and gate first, expand afterwards.

shrunk, total = shrink_gate(x, lora_A, gate_weight, gate_bias, scaling=2.0)
y = gated_linear(x, weight, bias, shrunk, total, lora_B)          # our GEMM, or
y = any_base(x); gated_expand_(y, shrunk, total, lora_B)          # any other, bias inside
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mogu_kernels import checks, cpu, eager
from mogu_kernels.ops import library
from mogu_kernels.tuning import TileConfig


def shrink_gate(
    x: Tensor,
    lora_A: Tensor | Sequence[Tensor],
    gate_weight: Tensor | Sequence[Tensor],
    gate_bias: Tensor | Sequence[Tensor],
    *,
    scaling: float | Sequence[float],
    gate: str = "sigmoid",
    routed: Tensor | None = None,
    return_gates: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Routers and shrink of one projection, or of several that read the same x, in one launch.

    Semantics:
        gates = torch.sigmoid(x @ gate_weight.T + gate_bias)  # or softmax over the experts
        total = gates.sum(1)  # 1 where routed is False
        shrunk = torch.cat(
            [scaling[e] * gates[:, e : e + 1] * (x @ lora_A[e].T) for e in range(E)], 1
        )  # 0 where routed is False

    Args:
        x: [M, K].
        lora_A: [E, r, K], or P of them (all of one shape), as for q, k and v.
        gate_weight: [E, K] fp32 or, split, [2, E, K] in x's dtype; or P of them.
        gate_bias: [E] fp32, or P of them.
        scaling: `lora_alpha / rank`, one number for all experts or one each.
        gate: "sigmoid" (as published) or "softmax".
        routed: bool [M], or None for all.
        return_gates: also return the gates.
        backend: "auto", "triton", "cpu" or "eager".

    Returns:
        shrunk [M, E * r] in x's dtype and total [M] in fp32 (fp64 if x is); with `return_gates`
        also gates [M, E]. Given P projections, each has a leading axis of P.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device, a name or a number of experts does not fit.
    """
    one = isinstance(lora_A, Tensor)
    A, u, c = ([t] if isinstance(t, Tensor) else list(t) for t in (lora_A, gate_weight, gate_bias))
    if not len(A) == len(u) == len(c) >= 1:
        raise ValueError(f"{len(A)} lora_A, {len(u)} gate_weight, {len(c)} gate_bias: one each")
    checks.check_matrix(x)
    x, *A = library.autocast(x.device.type, (x, *A))
    for tensors in zip(A, u, c, strict=True):
        checks.check_router(x, *tensors, gate, routed)
    if len({tensor.shape for tensor in A}) > 1:
        raise ValueError(
            f"lora_A are {[list(tensor.shape) for tensor in A]}: projections that share a launch "
            "have one shape; pad the ranks with zeros"
        )
    checks.check_backend(backend, x)
    args = (x, A, u, c, checks.scaling_per_expert(scaling, len(A[0])), gate, routed)
    if library.needs_grad(x, A, u, c):
        out = library.outside_autocast(_eager_shrink, x.device.type, *args)
    else:
        out = torch.ops.mogu.shrink_gate(*args, return_gates, backend)
    out = out if return_gates else out[:2]
    return tuple(tensor[0] for tensor in out) if one else tuple(out)


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shrunk: Tensor,
    total: Tensor,
    lora_B: Tensor,
    *,
    backend: str = "auto",
    config: TileConfig | None = None,
) -> Tensor:
    """The base projection with gate and expand in its epilogue: the second launch of two.

    Semantics:
        E, N, r = lora_B.shape
        y = total[:, None] * F.linear(x, weight, bias) + shrunk @ lora_B.transpose(1, 2).reshape(
            E * r, N
        )

    Args:
        x: [M, K].
        weight: [N, K].
        bias: [N] or None.
        shrunk: [M, E * r] and
        total: [M], of one projection, as `shrink_gate` returns them.
        lora_B: [E, N, r].
        backend: "auto", "triton" or "eager".
        config: a two_launch config; chosen by M, rank and dtype if None.

    Returns:
        y [M, N] in x's dtype.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or a name does not fit.
    """
    x, weight, bias, shrunk, lora_B = library.autocast(
        x.device.type, (x, weight, bias, shrunk, lora_B)
    )
    checks.check_linear(x, weight, bias, lora_B)
    checks.check_shrunk(len(x), x, shrunk, total, lora_B, bias)
    checks.check_backend(backend, x)
    if config is not None and (config.kernel != "two_launch" or config.one_launch):
        raise ValueError(f"config {config} has no second launch: take a two_launch config")
    args = (x, weight, bias, shrunk, total, lora_B)
    if library.needs_grad(*args):
        return library.outside_autocast(eager.gated_linear, x.device.type, *args)
    return torch.ops.mogu.gated_linear(*args, backend, library.text(config))


def gated_expand_(
    y: Tensor,
    shrunk: Tensor,
    total: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Gate and expand a projection that something else has computed, in place.

    Semantics:
        E, N, r = lora_B.shape
        B = lora_B.transpose(1, 2).reshape(E * r, N)
        y.copy_(total[:, None] * (y if bias is None else y + bias) + shrunk @ B)

    Args:
        y: [M, N], the base projection; changed.
        shrunk: [M, E * r] and
        total: [M], of one projection, as `shrink_gate` returns them.
        lora_B: [E, N, r].
        bias: [N] if y does not hold it yet.
        backend: "auto", "triton", "cpu" or "eager".

    Returns:
        y.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or a name does not fit.
    """
    checks.check_matrix(y)
    checks.check_shrunk(len(y), y, shrunk, total, lora_B, bias)
    if lora_B.shape[1] != y.shape[1]:
        raise ValueError(f"lora_B is {list(lora_B.shape)}, but y is {list(y.shape)}")
    checks.check_backend(backend, y)
    args = (y, shrunk, total, lora_B, bias)
    if library.needs_grad(*args):
        wide = (y.clone(), *args[1:])
        return y.copy_(library.outside_autocast(eager.gated_expand, y.device.type, *wide))
    torch.ops.mogu.gated_expand_(*args, backend)
    return y


def takes_two_launches(x: Tensor, rank_columns: int) -> bool:
    """Whether `mogu_linear` would shrink x [M, K] in a launch of its own."""
    if library.choose("auto", x) != "triton" or len(x) == 0:
        return False
    from mogu_kernels import launch

    return launch.choose_tiles("mogu_linear", x, x.shape[1], rank_columns).kernel == "two_launch"


def _eager_shrink(x, lora_A, gate_weight, gate_bias, scaling, gate, routed):
    """`eager.shrink_gate` of every projection, stacked, in the dtypes that the op promises."""
    each = [
        eager.shrink_gate(x, *tensors, scaling, gate, routed)
        for tensors in zip(lora_A, gate_weight, gate_bias, strict=True)
    ]
    shrunk, total, gates = (torch.stack(tensors) for tensors in zip(*each, strict=True))
    return shrunk.to(x.dtype), total, gates


def _shrink_gate(*args: Any):
    *operands, return_gates, backend = args
    x = operands[0]
    chosen = library.choose(backend, x)
    if chosen != "triton":
        if chosen == "cpu":
            shrunk, total, gates = cpu.shrink_gate(*operands)
        else:
            shrunk, total, gates = library.outside_autocast(_eager_shrink, x.device.type, *operands)
        return shrunk, total, gates if return_gates else gates[..., :0].clone()
    from mogu_kernels import launch

    return launch.shrink_gate(*operands, return_gates=return_gates)


def _fake_shrink_gate(x, lora_A, *args):
    P, M, (E, rank, _) = len(lora_A), x.shape[0], lora_A[0].shape
    wide = torch.promote_types(x.dtype, torch.float32)
    columns = E if args[-2] else 0
    return (
        x.new_empty(P, M, E * rank),
        x.new_empty(P, M, dtype=wide),
        x.new_empty(P, M, columns, dtype=wide),
    )


def _gated_linear(x, weight, bias, shrunk, total, lora_B, backend, config):
    operands = (x, weight, bias, shrunk, total, lora_B)
    if library.choose(backend, x) != "triton":
        return library.outside_autocast(eager.gated_linear, x.device.type, *operands)
    from mogu_kernels import launch

    return launch.gated_linear(*operands, library.parse(config))


def _gated_expand_(y, shrunk, total, lora_B, bias, backend):
    chosen = library.choose(backend, y)
    if chosen == "cpu":
        return cpu.gated_expand_(y, shrunk, total, lora_B, bias)
    if chosen == "eager":
        operands = (y, shrunk, total, lora_B, bias)
        y.copy_(library.outside_autocast(eager.gated_expand, y.device.type, *operands))
        return
    from mogu_kernels import launch

    launch.gated_expand_(y, shrunk, total, lora_B, bias)


library.define(
    "shrink_gate(Tensor x, Tensor[] lora_A, Tensor[] gate_weight, Tensor[] gate_bias, "
    "float[] scaling, str gate, Tensor? routed, bool return_gates, str backend) "
    "-> (Tensor shrunk, Tensor total, Tensor gates)",
    _shrink_gate,
    _fake_shrink_gate,
)
library.define(
    "gated_linear(Tensor x, Tensor weight, Tensor? bias, Tensor shrunk, Tensor total, "
    "Tensor lora_B, str backend, str config) -> Tensor",
    _gated_linear,
    lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
)
library.define(
    "gated_expand_(Tensor(a!) y, Tensor shrunk, Tensor total, Tensor lora_B, Tensor? bias, "
    "str backend) -> ()",
    _gated_expand_,
    lambda *_: None,
)
