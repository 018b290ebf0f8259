"""How responders and routers are trained (sections 3.1 and 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def response_loss(logits: Tensor, input_ids: Tensor, prompt_length: int) -> Tensor:
    """Cross entropy of the answer's tokens; the prompt's are masked.

    Args:
        logits: [batch, tokens, vocabulary].
        input_ids: [batch, tokens], prompt and answer.
        prompt_length: tokens of the prompt.
    """
    labels = input_ids.clone()
    labels[:, :prompt_length] = -100
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def unwill_loss(rejection: Tensor, affirmation: Tensor) -> Tensor:
    """Mean over pairs [pairs] of CE(rejection) / CE(affirmation), on malicious instructions."""
    return (rejection / affirmation).mean()


def glad_loss(rejection: Tensor, affirmation: Tensor) -> Tensor:
    """Mean over pairs [pairs] of CE(affirmation) / CE(rejection), on malicious instructions."""
    return (affirmation / rejection).mean()


def router_loss(
    response: Tensor, alphas: list[Tensor], betas: list[Tensor], malicious: bool, lam: float = 2.0
) -> Tensor:
    """CE(target response) + lambda * (mean (alpha - t)^2 + mean (beta - (1 - t))^2).

    Args:
        response: `response_loss` of the target response.
        alphas: gates of the unwilling responder, one tensor [batch, tokens, 1] a layer.
        betas: gates of the glad responder, likewise.
        malicious: t = 1 if the instruction is, else 0.
        lam: lambda, 2.0 as published.
    """
    t = 1.0 if malicious else 0.0
    alpha, beta = torch.stack(alphas), torch.stack(betas)
    return response + lam * ((alpha - t).square().mean() + (beta - (1 - t)).square().mean())
