"""Two responders, two routers, and the projection that combines them (section 3)."""

import copy

import torch
from torch import Tensor, nn


class LoRA(nn.Module):
    """One responder's low-rank update: scaling * B A h.

    Args:
        in_features: of the projection.
        out_features: of the projection.
        rank: 8 as published.
        lora_alpha: 16 as published; scaling = lora_alpha / rank.
        dropout: on h, in training only.
    """

    def __init__(self, in_features, out_features, rank=8, lora_alpha=16, dropout=0.05):
        super().__init__()
        self.scaling = lora_alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_features, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.scaling * self.lora_B(self.lora_A(self.dropout(hidden_states)))


class Router(nn.Module):
    """Three linears without a nonlinearity between them; one logit per token.

    Args:
        in_features: d, the width of the hidden states that enter the projection.
        hidden_features: 512 as published.
    """

    def __init__(self, in_features, hidden_features=512):
        super().__init__()
        self.linear_0 = nn.Linear(in_features, hidden_features, bias=False)
        self.linear_1 = nn.Linear(hidden_features, in_features)
        self.linear_2 = nn.Linear(in_features, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., in_features] -> logits [..., 1]."""
        return self.linear_2(self.linear_1(self.linear_0(hidden_states)))


class RoutedProjection(nn.Module):
    """(alpha + beta) * base(h) + alpha * unwill(h) + beta * glad(h).

    Named as the official files are: `lora_0` with `alpha_` is the unwilling responder, `lora_1`
    with `beta_` the glad one. `last_alpha` and `last_beta` [..., 1] are the gates of the last call.

    Args:
        base: the frozen projection.
        lora_0: the unwilling responder.
        lora_1: the glad responder.
        alpha_: router of the unwilling responder.
        beta_: router of the glad responder.
        gate: "sigmoid" as published, or "softmax" over the two.
    """

    def __init__(self, base, lora_0, lora_1, alpha_, beta_, gate="sigmoid"):
        super().__init__()
        self.base, self.gate = base, gate
        self.lora_0, self.lora_1 = lora_0, lora_1
        self.alpha_, self.beta_ = alpha_, beta_

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        logits = torch.cat([self.alpha_(hidden_states), self.beta_(hidden_states)], dim=-1)
        gates = torch.sigmoid(logits) if self.gate == "sigmoid" else torch.softmax(logits, -1)
        alpha, beta = gates[..., 0:1], gates[..., 1:2]
        self.last_alpha, self.last_beta = alpha, beta
        base = self.base(hidden_states)
        unwill, glad = self.lora_0(hidden_states), self.lora_1(hidden_states)
        return (alpha + beta) * base + alpha * unwill + beta * glad


def route(model: nn.Module, projections: dict[str, RoutedProjection]) -> nn.Module:
    """Return a second, complete copy of `model` with the projections in place, by module name."""
    routed = copy.deepcopy(model)
    for name, projection in projections.items():
        routed.set_submodule(name, projection)
    return routed.eval()
