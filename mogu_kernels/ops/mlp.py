"""`gated_mlp`: two routed projections of the same hidden states and their gated product."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mogu_kernels import checks, cpu, eager
from mogu_kernels.ops import library
from mogu_kernels.tuning import TileConfig


def gated_mlp(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    gate_weight: Sequence[Tensor],
    gate_bias: Sequence[Tensor],
    *,
    scaling: float | Sequence[float],
    activation: str = "silu",
    gate: str = "sigmoid",
    routed: Tensor | None = None,
    return_gates: bool = False,
    backend: str = "auto",
    config: TileConfig | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """SwiGLU or GeGLU with both projections routed: one shrink and one GEMM kernel.

    Semantics:
        gate_proj, up_proj = (
            mogu_linear(x, weight[j], bias[j], lora_A[j], lora_B[j], gate_weight[j], gate_bias[j],
                        scaling=scaling, gate=gate, routed=routed)
            for j in range(2)
        )
        y = F.silu(gate_proj) * up_proj  # or gelu; in fp32, rounded once

    Args:
        x: [M, K] in fp32, fp16 or bf16 (fp64 with `backend="eager"`).
        weight: gate_proj's and up_proj's, [N, K] each; every sequence here is such a pair.
        bias: [N] each, or None.
        lora_A: [E, r, K] each.
        lora_B: [E, N, r] each.
        gate_weight: [E, K] fp32 each or, split, [2, E, K] in x's dtype.
        gate_bias: [E] fp32 each.
        scaling: `lora_alpha / rank`, one number for all experts or one each, of both projections.
        activation: "silu", "gelu" (by erf) or "gelu_tanh".
        gate: "sigmoid" (as published) or "softmax".
        routed: bool [M]; where False the row is the plain MLP. None routes every row.
        return_gates: also return what the routers say.
        backend: "auto", "triton", "cpu" or "eager".
        config: the tiles, two_launch; chosen by M, rank and dtype if None. Triton only.

    Returns:
        y [M, N] in x's dtype, or (y, gates [2, M, E] fp32; fp64 if x is).

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device, a name or a number of experts does not fit.
    """
    if bias is not None and any(each is None for each in bias):
        raise ValueError("bias has None in it: take one for each projection, or None for both")
    if config is None and library.is_direct(backend, x):
        biases = (None, None) if bias is None else bias
        lists = (weight, biases, lora_A, lora_B, gate_weight, gate_bias)
        own: Any = tuple(zip(*lists, strict=False)) if {len(each) for each in lists} == {2} else ()
        done = cpu.project(x, own, activation, scaling, gate, routed, return_gates)
        if done is not None:
            return done if return_gates else done[0]
    operands = {
        "weight": weight,
        "bias": () if bias is None else bias,
        "lora_A": lora_A,
        "lora_B": lora_B,
        "gate_weight": gate_weight,
        "gate_bias": gate_bias,
    }
    for name, pair in operands.items():
        if len(pair) != 2 and (name, bias) != ("bias", None):
            raise ValueError(f"{name} has {len(pair)} entries: take gate_proj's and up_proj's")
    device = x.device.type
    x, *weight = library.autocast(device, (x, *weight))
    bias, lora_A, lora_B = (
        library.autocast(device, operands[name]) for name in ("bias", "lora_A", "lora_B")
    )
    for j in range(2):
        checks.check_linear(x, weight[j], bias[j] if bias else None, lora_B[j])
        checks.check_router(x, lora_A[j], gate_weight[j], gate_bias[j], gate, routed)
        checks.check_pair(lora_A[j], lora_B[j])
    for name, pair in (("weight", weight), ("lora_A", lora_A)):
        if pair[0].shape != pair[1].shape:
            raise ValueError(
                f"{name} is {list(pair[0].shape)} in gate_proj but {list(pair[1].shape)} in "
                "up_proj: take one shape"
            )
    if activation not in eager.ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: take one of {', '.join(eager.ACTIVATIONS)}")
    checks.check_backend(backend, x)
    if config is not None and (config.kernel != "two_launch" or config.one_launch):
        raise ValueError(f"config {config} does not fit a gated MLP: take a two_launch config")
    y, gates = torch.ops.mogu.gated_mlp(
        x, weight, bias, lora_A, lora_B, list(gate_weight), list(gate_bias),
        checks.scaling_per_expert(scaling, len(lora_A[0])), gate, activation, routed,
        return_gates, backend, library.text(config),
    )  # fmt: skip
    return (y, gates) if return_gates else y


def _implementation(*args):
    *operands, return_gates, backend, config = args
    x = operands[0]
    chosen = library.choose(backend, x)
    if chosen == "eager":
        y, gates = library.outside_autocast(eager.gated_mlp, x.device.type, *operands)
        return y, gates if return_gates else gates[..., :0].clone()
    if chosen == "cpu":
        return cpu.gated_mlp(*operands, return_gates=return_gates)
    from mogu_kernels import launch

    return launch.gated_mlp(*operands, return_gates=return_gates, config=library.parse(config))


def _fake(x, weight, bias, lora_A, *args):
    y = x.new_empty(x.shape[0], weight[0].shape[0])
    columns = lora_A[0].shape[0] if args[-3] else 0
    wide = torch.promote_types(x.dtype, torch.float32)
    return y, x.new_empty(2, x.shape[0], columns, dtype=wide)


def _save(ctx, inputs, output):
    x, *lists, ctx.scaling, ctx.gate, ctx.activation, routed, ctx.return_gates, _, _ = inputs
    ctx.lengths = [len(tensors) for tensors in lists]
    ctx.save_for_backward(x, routed, *(tensor for tensors in lists for tensor in tensors))


@once_differentiable
def _backward(ctx, grad_y, grad_gates):
    x, routed, *flat = ctx.saved_tensors
    lists = [[flat.pop(0) for _ in range(length)] for length in ctx.lengths]
    grads = library.outside_autocast(
        eager.gated_mlp_backward,
        x.device.type,
        grad_y,
        grad_gates if ctx.return_gates else None,
        x,
        *lists,
        ctx.scaling,
        ctx.gate,
        ctx.activation,
        routed,
    )
    return *grads, None, None, None, None, None, None, None


library.define(
    "gated_mlp(Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] lora_A, Tensor[] lora_B, "
    "Tensor[] gate_weight, Tensor[] gate_bias, float[] scaling, str gate, str activation, "
    "Tensor? routed, bool return_gates, str backend, str config) -> (Tensor y, Tensor gates)",
    _implementation,
    _fake,
)
torch.library.register_autograd(
    "mogu::gated_mlp", _backward, setup_context=_save, lib=library.LIBRARY
)
