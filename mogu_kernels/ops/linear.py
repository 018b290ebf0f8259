"""`mogu_linear`: the routed projection."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        y [M, N] in x's dtype, or (y, gates [M, E] fp32; fp64 if x is). Differentiable once in every
        tensor; beside the operands a backward keeps the gates and A_e x [M, E * r] in fp32, which
        is 72 bytes a token at r = 8 and E = 2.

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
    operands = (x, weight, bias, lora_A, lora_B, gate_weight, gate_bias)
    # an exported graph is for inference: it stores nothing for a backward
    for_backward = library.needs_grad(*operands) and not torch.compiler.is_exporting()
    y, gates, _ = torch.ops.mogu.mogu_linear(
        *operands, scaling, gate, routed, return_gates, backend, library.text(config), for_backward
    )
    return (y, gates) if return_gates else y


def _implementation(
    x, weight, bias, lora_A, lora_B, gate_weight, gate_bias, scaling, gate, routed,
    return_gates, backend, config, for_backward=False,
):  # fmt: skip
    own = (weight, bias, lora_A, lora_B, gate_weight, gate_bias, scaling, gate, routed)
    chosen = library.choose(backend, x)
    if chosen == "triton":
        from mogu_kernels import launch  # Triton is imported by whoever needs it

        columns = lora_A.shape[0] * lora_A.shape[1] if for_backward else 0
        ranks = x.new_empty(len(x), columns, dtype=torch.float32)
        y, gates = launch.mogu_linear(
            x, *own, return_gates or for_backward, library.parse(config), ranks if columns else None
        )
        return y, gates, ranks
    if chosen == "cpu":
        y, gates = cpu.mogu_linear(x, *own, return_gates=return_gates or for_backward)
        if not for_backward:
            return y, gates, _nothing(gates)
        return y, gates, library.outside_autocast(eager.shrink, "cpu", x, lora_A)
    y, gates, ranks = library.outside_autocast(
        eager.mogu_linear_for_backward, x.device.type, x, *own
    )
    if for_backward:
        return y, gates, ranks
    return y, gates if return_gates else _nothing(gates), _nothing(gates)


def _nothing(gates: Tensor) -> Tensor:
    """An output that was not asked for: [M, 0]."""
    return gates.new_empty(len(gates), 0)


def _fake(
    x, weight, bias, lora_A, lora_B, gate_weight, gate_bias, scaling, gate, routed,
    return_gates, backend, config, for_backward=False,
):  # fmt: skip
    """Shapes and dtypes only."""
    M, (E, rank, _) = x.shape[0], lora_A.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(M, weight.shape[0]),
        x.new_empty(M, E if return_gates or for_backward else 0, dtype=wide),
        x.new_empty(M, E * rank if for_backward else 0, dtype=wide),
    )


def _save(ctx, inputs, output):
    """Operands, and what the forward found on the way: [M, E] gates and [M, E * r] ranks."""
    *tensors, ctx.scaling, ctx.gate, routed, _, ctx.backend, _, for_backward = inputs
    _, gates, ranks = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(ranks)
    found = (gates, ranks) if for_backward else (None, None)
    ctx.save_for_backward(*tensors, routed, *found)


@once_differentiable
def _backward(ctx, grad_y, grad_gates, _):
    *tensors, routed, gates, ranks = ctx.saved_tensors
    if ranks is None:  # the bare op was called, or an exported graph: found once more
        x, _, _, lora_A, _, gate_weight, gate_bias = tensors
        gates, ranks = eager.gates_and_ranks(x, lora_A, gate_weight, gate_bias, ctx.gate)
        grad_gates = None if grad_gates is None or not grad_gates.shape[1] else grad_gates
    wanted = list(ctx.needs_input_grad[: len(tensors)])
    args = (grad_y, grad_gates, gates, ranks, *tensors, ctx.scaling, ctx.gate, routed, wanted)
    grads = iter(torch.ops.mogu.mogu_linear_backward(*args, ctx.backend))
    return *(next(grads) if want else None for want in wanted), *[None] * 7


def _backward_implementation(*args):
    *operands, backend = args
    x = operands[4]
    if library.choose(backend, x) == "triton":
        from mogu_kernels import launch

        grads = launch.mogu_linear_backward(*operands)
    else:
        grads = library.outside_autocast(eager.mogu_linear_backward, x.device.type, *operands)
    return [grad for grad in grads if grad is not None]


def _fake_backward(grad_y, grad_gates, gates, ranks, *args):
    tensors, wanted = list(args[:7]), args[-2]
    grads = [None if t is None else t.new_empty(t.shape) for t in tensors]
    E, N, rank = tensors[4].shape
    grads[4] = tensors[4].new_empty(N, E, rank).permute(1, 0, 2)  # as it lies in a module
    return [grad for grad, want in zip(grads, wanted, strict=True) if want]


library.define(
    "mogu_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
    "Tensor gate_weight, Tensor gate_bias, float[] scaling, str gate, Tensor? routed, "
    "bool return_gates, str backend, str config, bool for_backward=False) "
    "-> (Tensor y, Tensor gates, Tensor ranks)",
    _implementation,
    _fake,
)
library.define(
    "mogu_linear_backward(Tensor? grad_y, Tensor? grad_gates, Tensor gates, Tensor ranks, "
    "Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor gate_weight, "
    "Tensor gate_bias, float[] scaling, str gate, Tensor? routed, bool[] wanted, str backend) "
    "-> Tensor[]",
    _backward_implementation,
    _fake_backward,
)
torch.library.register_autograd(
    "mogu::mogu_linear", _backward, setup_context=_save, lib=library.LIBRARY
)
