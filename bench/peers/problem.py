"""What every peer is given: one layer with two experts, its routers published and folded."""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mogu_kernels.router import fold_router, split_gate_weight
from reference.model import Router
from tests.oracle import Projection


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tiles for all kernels of a peer, in place of those that it would choose."""

    M: int
    N: int
    K: int


@dataclasses.dataclass(kw_only=True)
class Problem:
    """One layer: `projection` holds the folded router in fp32, `routers` the published ones.

    `tokens` is the M that tiles are chosen for; x may have fewer rows.
    """

    projection: Projection
    routers: list[nn.Module]
    tokens: int

    @property
    def gate_weight(self) -> Tensor:
        """The fold in x's dtype, [E, K]."""
        return self.projection.gate_weight.to(self.projection.x.dtype)

    def logits(self, folded: bool):
        """A function of x: router logits [M, E], in one launch or as published."""
        if not folded:
            return lambda x: torch.cat([router(x) for router in self.routers], dim=1)
        weight, bias = self.gate_weight, self.projection.gate_bias.to(self.projection.x.dtype)
        return lambda x: F.linear(x, weight, bias)


def make(*, M, N, K, rank, dtype, hidden=512, tokens=None, seed=0) -> Problem:
    """Gaussian operands of unit scale; two experts, sigmoid gates, no bias, as published."""
    torch.manual_seed(seed)
    routers = [Router(K, hidden).to(dtype) for _ in range(2)]
    for router in routers:
        for linear in router.children():
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    stacked = [
        torch.stack([getattr(getattr(router, layer), name) for router in routers])
        for layer, name in (
            ("linear_0", "weight"), ("linear_1", "weight"), ("linear_1", "bias"),
            ("linear_2", "weight"), ("linear_2", "bias"),
        )
    ]  # fmt: skip
    gate_weight, gate_bias = fold_router(*stacked)
    return Problem(
        projection=Projection(
            x=torch.randn(M, K).to(dtype),
            weight=(torch.randn(N, K) * K**-0.5).to(dtype),
            bias=None,
            lora_A=(torch.randn(2, rank, K) * K**-0.5).to(dtype),
            lora_B=(torch.randn(2, N, rank) * rank**-0.5).to(dtype),
            gate_weight=gate_weight.detach(),
            gate_bias=gate_bias.detach(),
            scaling=[2.0, 2.0],
        ),
        routers=routers,
        tokens=tokens or M,
    )


def split_router(problem: Problem) -> Tensor:
    """What our kernels read in half precision: high and low part, [2, E, K]."""
    p = problem.projection
    if p.x.element_size() > 2:
        return p.gate_weight
    return split_gate_weight(p.gate_weight, p.x.dtype)
