"""The published form, operation by operation, from the reference."""

from torch import nn

from reference.model import LoRA, RoutedProjection


def build(problem, folded, blocks=None):
    """`RoutedProjection` in eager mode; with the fold, each router is one linear of one output."""
    p = problem.projection
    N, K = p.weight.shape
    experts = []
    for lora_A, lora_B, scaling in zip(p.lora_A, p.lora_B, p.scaling, strict=True):
        rank = len(lora_A)
        expert = LoRA(K, N, rank, lora_alpha=scaling * rank)
        expert.lora_A, expert.lora_B = _linear(lora_A), _linear(lora_B)
        experts.append(expert)
    routers = problem.routers
    if folded:
        biases = p.gate_bias.to(p.x.dtype)
        routers = [
            _linear(u[None], c[None]) for u, c in zip(problem.gate_weight, biases, strict=True)
        ]
    return RoutedProjection(_linear(p.weight), *experts, *routers).eval()


def _linear(weight, bias=None):
    linear = nn.Linear(1, 1, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear
