"""What is minimised: the ratio loss of a responder, the response and gate loss of the routers.

Source: MoGU, arXiv 2405.14488, sections 3.1 and 3.2. `reference/losses.py` has the same, literally.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from mogu_kernels.training.batches import IGNORED


def response_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each answer [S].

    Args:
        logits: [S, L, vocabulary], which foretell the labels.
        labels: [S, L]; `IGNORED` where there is none.
    """
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(labels.shape).sum(1) / (labels != IGNORED).sum(1)


def ratio_loss(wanted: Tensor, unwanted: Tensor) -> Tensor:
    """Mean over pairs of CE(wanted) / CE(unwanted).

    Wanted is the rejection for the unwilling responder, the affirmation for the glad one.

    Args:
        wanted: [P], `response_loss` of one answer.
        unwanted: [P], of the other answer to the same prompt.
    """
    return (wanted / unwanted).mean()


def gate_loss(
    gates: Iterable[Tensor], names: tuple[str, ...], malicious: Tensor, tokens: Tensor
) -> Tensor:
    """Mean (unwill - t)^2 + mean (glad - (1 - t))^2 of each sequence [S].

    The mean is over layers and all tokens of the sequence; t = 1 for malicious instructions.

    Args:
        gates: [R, T, E] of each routed projection.
        names: of the experts, "glad" and "unwill" among them.
        malicious: float [S].
        tokens: bool [S, R, T], whether a token is of a sequence.
    """
    every = torch.stack(list(gates)).flatten(1, 2)  # [layers, R * T, E]
    own = tokens.flatten(1).to(every.dtype)
    target = torch.stack([malicious if name == "unwill" else 1 - malicious for name in names], -1)
    # the mean of (g - t)^2 over tokens, without a copy of the gates for every sequence
    squares, means = (_token_mean(g.mean(0), own) for g in (every.square(), every))
    return (squares - 2 * target * means + target.square()).sum(-1)


def gate_separation(
    gates: Iterable[Tensor], names: tuple[str, ...], malicious: Tensor, tokens: Tensor
) -> Tensor:
    """Mean unwill gate of malicious sequences minus that of benign ones; NaN without both.

    Args:
        gates: as in `gate_loss`.
        names: likewise.
        malicious: likewise.
        tokens: likewise.
    """
    own = torch.stack([g[..., names.index("unwill")].detach() for g in gates]).mean(0)
    means = _token_mean(own.flatten()[:, None], tokens.flatten(1).to(own.dtype))[:, 0]
    return means[malicious > 0].mean() - means[malicious == 0].mean()


def _token_mean(values: Tensor, own: Tensor) -> Tensor:
    """Mean of values [tokens, E] over the tokens of each sequence [S, tokens]: [S, E]."""
    return own @ values / own.sum(1, keepdim=True)
