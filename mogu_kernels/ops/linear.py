"""`mogu_linear`: the routed projection."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mogu_kernels import checks, cpu, eager
from mogu_kernels.ops import library
from mogu_kernels.tuning import TileConfig


def mogu_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    *,
    scaling: float | Sequence[float],
    gate: str = "sigmoid",
    routed: Tensor | None = None,
    return_gates: bool = False,
    backend: str = "auto",
    config: TileConfig | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear projection with E low-rank experts, weighed per token by a router.

    Semantics:
        gates = torch.sigmoid(x @ gate_weight.T + gate_bias)  # or softmax over the experts
        y = gates.sum(1, keepdim=True) * F.linear(x, weight, bias) + sum(
            scaling[e] * gates[:, e : e + 1] * (x @ lora_A[e].T @ lora_B[e].T) for e in range(E)
        )

    Args:
        x: [M, K] in fp32, fp16 or bf16 (fp64 with `backend="eager"`); any strides, here and below.
        weight: [N, K], x's dtype.
        bias: [N], x's dtype, or None. It belongs to the base: the total of the gates multiplies it.
        lora_A: [E, r, K], x's dtype; an expert of smaller rank is padded with zeros.
        lora_B: [E, N, r], x's dtype.
        gate_weight: [E, K] in fp32 (fp64 if x is), or [2, E, K] in x's dtype, a high and a low part
            as `split_gate_weight` makes it, which is what half precision on a GPU reads.
        gate_bias: [E] in fp32 (fp64 if x is).
        scaling: `lora_alpha / rank`, one number for all experts or one each.
        gate: "sigmoid" (as published) or "softmax".
        routed: bool [M]; where False the row is the plain projection, as if the gates summed to 1
            and every expert were zero. None routes every row.
        return_gates: also return what the router says, for every row, routed or not.
        backend: "auto", "triton", "cpu" or "eager".
        config: the tiles; chosen by M, rank and dtype if None. Triton only.

    Returns:
        y [M, N] in x's dtype, or (y, gates [M, E] fp32; fp64 if x is).

    Raises:
        TypeError: a dtype does not fit, or an argument is not a tensor.
        ValueError: a shape, a device, a name or a number of experts does not fit.

    Source: MoGU, arXiv 2405.14488, section 3.2.
    """
    if config is None and library.is_direct(backend, x):
        own = (weight, bias, lora_A, lora_B, gate_weight, gate_bias)
        done = cpu.project(x, (own,), None, scaling, gate, routed, return_gates)
        if done is not None:
            return (done[0], done[1][0]) if return_gates else done[0]
    x, weight, bias, lora_A, lora_B = library.autocast(
        x.device.type, (x, weight, bias, lora_A, lora_B)
    )
    scaling = checks.scaling_per_expert(scaling, len(lora_A))
    checks.check_linear(x, weight, bias, lora_B)
    checks.check_router(x, lora_A, gate_weight, gate_bias, gate, routed)
    checks.check_pair(lora_A, lora_B)
    checks.check_backend(backend, x)
    y, gates = torch.ops.mogu.mogu_linear(
        x, weight, bias, lora_A, lora_B, gate_weight, gate_bias, scaling, gate, routed,
        return_gates, backend, library.text(config),
    )  # fmt: skip
    return (y, gates) if return_gates else y


def _implementation(*args):
    *operands, return_gates, backend, config = args
    x = operands[0]
    chosen = library.choose(backend, x)
    if chosen == "eager":
        y, gates = library.outside_autocast(eager.mogu_linear, x.device.type, *operands)
        return y, gates if return_gates else gates.new_empty(len(x), 0)
    if chosen == "cpu":
        return cpu.mogu_linear(*operands, return_gates=return_gates)
    from mogu_kernels import launch  # Triton is imported by whoever needs it

    return launch.mogu_linear(*operands, return_gates=return_gates, config=library.parse(config))


def _fake(x, weight, bias, lora_A, *args):
    """Shapes and dtypes only."""
    return_gates = args[-3]
    gates_dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty(x.shape[0], weight.shape[0])
    columns = lora_A.shape[0] if return_gates else 0
    return y, x.new_empty(x.shape[0], columns, dtype=gates_dtype)


def _save(ctx, inputs, output):
    *tensors, ctx.scaling, ctx.gate, routed, ctx.return_gates, _, _ = inputs
    ctx.save_for_backward(*tensors, routed)


def _backward(ctx, grad_y, grad_gates):
    *tensors, routed = ctx.saved_tensors
    grads = eager.mogu_linear_backward(
        grad_y,
        grad_gates if ctx.return_gates else None,
        *tensors,
        scaling=ctx.scaling,
        gate=ctx.gate,
        routed=routed,
        wanted=ctx.needs_input_grad[: len(tensors)],
    )
    return *grads, None, None, None, None, None, None


library.define(
    "mogu_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
    "Tensor gate_weight, Tensor gate_bias, float[] scaling, str gate, Tensor? routed, "
    "bool return_gates, str backend, str config) -> (Tensor y, Tensor gates)",
    _implementation,
    _fake,
)
torch.library.register_autograd(
    "mogu::mogu_linear", _backward, setup_context=_save, lib=library.LIBRARY
)
