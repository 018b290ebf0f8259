"""The router: trained as three linears per expert, run as one vector and one bias per expert.

Source: MoGU (arXiv 2405.14488, section 3.2). The published router has no nonlinearity between its
linears, so the stack is one affine map; folding it is exact, not an approximation.
"""

import torch
from torch import Tensor, nn


def fold_router(
    linear_0_weight: Tensor,
    linear_1_weight: Tensor,
    linear_1_bias: Tensor,
    linear_2_weight: Tensor,
    linear_2_bias: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Collapse the three linears of E experts into `gate_weight` and `gate_bias`; differentiable.

    Semantics (per expert):
        gate_weight = linear_2_weight @ linear_1_weight @ linear_0_weight
        gate_bias = linear_2_weight @ linear_1_bias + linear_2_bias

    Args:
        linear_0_weight: [E, H, K].
        linear_1_weight: [E, K, H].
        linear_1_bias: [E, K].
        linear_2_weight: [E, 1, K].
        linear_2_bias: [E, 1].
        dtype: of the result; the products are taken in fp64 whatever the inputs are.

    Returns:
        gate_weight [E, K] and gate_bias [E].

    Raises:
        ValueError: a tensor's shape does not fit the others.
    """
    if linear_0_weight.ndim != 3:
        raise ValueError(
            f"linear_0_weight is {list(linear_0_weight.shape)}: stack the experts into [E, H, K]"
        )
    E, H, K = linear_0_weight.shape
    shapes = {
        "linear_1_weight": (linear_1_weight, [E, K, H]),
        "linear_1_bias": (linear_1_bias, [E, K]),
        "linear_2_weight": (linear_2_weight, [E, 1, K]),
        "linear_2_bias": (linear_2_bias, [E, 1]),
    }
    for name, (tensor, shape) in shapes.items():
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)}, but linear_0_weight {[E, H, K]} asks for {shape}"
            )
    linears = (linear_0_weight, linear_1_weight, linear_1_bias, linear_2_weight, linear_2_bias)
    if torch.compiler.is_compiling():  # a compiler decides for itself what to keep
        return _products(*linears, dtype)
    return _Fold.apply(*linears, dtype)


def _products(linear_0, linear_1, linear_1_bias, linear_2, linear_2_bias, dtype):
    """The result of `fold_router`."""
    last = linear_2.double()
    gate_weight = last @ linear_1.double() @ linear_0.double()
    gate_bias = last @ linear_1_bias.double()[:, :, None] + linear_2_bias.double()[:, :, None]
    return gate_weight[:, 0].to(dtype), gate_bias[:, 0, 0].to(dtype)


class _Fold(torch.autograd.Function):
    """`_products` with its gradients; autograd by itself would keep fp64 copies of every linear.

    With du and dc the gradients of an expert's gate_weight and gate_bias, each gradient is of rank
    one: of linear_0 (linear_1^T linear_2^T) du^T, of linear_1 linear_2^T (linear_0 du)^T.
    """

    generate_vmap_rule = True

    forward = staticmethod(_products)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5])

    @staticmethod
    def backward(ctx, *grads):
        """As columns [E, K, 1] and [E, 1, 1], in fp32 at least."""
        parameters = ctx.saved_tensors
        wide = torch.promote_types(parameters[0].dtype, torch.float32)
        linear_0, linear_1, linear_1_bias, linear_2, _ = (p.to(wide) for p in parameters)
        du, dc = grads[0].to(wide)[:, :, None], grads[1].to(wide)[:, None, None]
        inner = linear_0 @ du
        found = (
            (linear_2 @ linear_1).mT @ du.mT,
            linear_2.mT @ inner.mT,
            dc[:, 0] * linear_2[:, 0],
            (linear_1 @ inner).mT + dc * linear_1_bias[:, None],
            dc[:, 0],
        )
        wanted = zip(found, parameters, ctx.needs_input_grad, strict=False)
        return *(grad.to(p.dtype) if want else None for grad, p, want in wanted), None


def split_gate_weight(gate_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Write `gate_weight` as a high and a low part in half precision, for tensor cores.

    A single bf16 vector costs up to 1.5e-2 in a gate; the sum of two is good to 7e-6.

    Args:
        gate_weight: [E, K] in fp32 or fp64.
        dtype: `torch.float16` or `torch.bfloat16`.

    Returns:
        [2, E, K] in `dtype`; the sum over the first axis is `gate_weight` to 16 or more bits.
    """
    high = gate_weight.to(dtype)
    return torch.stack([high, (gate_weight - high).to(dtype)])


class Router(nn.Module):
    """The published router of E experts: K -> 512 -> K -> 1 per expert, linears only.

    Parameters are stacked over the experts: `linear_0.weight` [E, H, K], `linear_1.weight` [E, K,
    H], `linear_1.bias` [E, K], `linear_2.weight` [E, 1, K], `linear_2.bias` [E, 1].

    Args:
        in_features: K, the width of the hidden states that enter the projection.
        num_experts: E.
        hidden_features: H, 512 as published.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, in_features, num_experts=2, hidden_features=512, *, device=None, dtype=None):
        """See the class."""
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.linear_0 = _StackedLinear(num_experts, in_features, hidden_features, False, options)
        self.linear_1 = _StackedLinear(num_experts, hidden_features, in_features, True, options)
        self.linear_2 = _StackedLinear(num_experts, in_features, 1, True, options)

    def fold(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """`fold_router` of these parameters: gate_weight [E, K] and gate_bias [E]."""
        return fold_router(
            self.linear_0.weight,
            self.linear_1.weight,
            self.linear_1.bias,
            self.linear_2.weight,
            self.linear_2.bias,
            dtype=dtype,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Gate logits [..., E] of hidden_states [..., K], through the fold."""
        gate_weight, gate_bias = self.fold(torch.promote_types(hidden_states.dtype, torch.float32))
        return nn.functional.linear(hidden_states.to(gate_weight.dtype), gate_weight, gate_bias)


class _StackedLinear(nn.Module):
    """E linears in one weight [E, out, in] and bias [E, out], initialised as `nn.Linear` is."""

    def __init__(self, num_experts, in_features, out_features, bias, options):
        super().__init__()
        bound = in_features**-0.5
        weight = torch.empty(num_experts, out_features, in_features, **options)
        self.weight = nn.Parameter(weight.uniform_(-bound, bound))
        if bias:
            bias = torch.empty(num_experts, out_features, **options)
            self.bias = nn.Parameter(bias.uniform_(-bound, bound))
