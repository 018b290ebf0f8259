"""Which layers tell malicious from benign prompts best: MoGU v2 routes only those."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mogu_kernels.training.batches import Item, Packer

BATCH = 16  # prompts in a pass
FOLDS = 5
PENALTY = 0.1  # on the squared weights; states are standardised


@torch.no_grad()
def last_hidden_states(model: Any, prompts: Sequence[list[int]], pad_token_id: int) -> Tensor:
    """What every layer gives for the last token of each prompt: [layers, prompts, hidden]."""
    packer, states = Packer(pad_token_id, model.dtype), []
    for begin in tqdm(range(0, len(prompts), BATCH), "hidden states", disable=None, leave=False):
        own = [Item(ids, [[pad_token_id]], False) for ids in prompts[begin : begin + BATCH]]
        batch = {name: t.to(model.device) for name, t in packer([own]).items()}
        out = model(
            **{key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")},
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,
        )
        hidden = torch.stack(out.hidden_states[1:])[:, :, batch["columns"]].flatten(1, 2)
        states.append(hidden[:, batch["places"][:, 0]].float().cpu())
    return torch.cat(states, dim=1)


def probe(states: Tensor, malicious: Tensor) -> tuple[Tensor, Tensor]:
    """A logistic regression for each layer, in which both classes weigh alike.

    Args:
        states: [layers, prompts, K].
        malicious: bool [prompts].

    Returns:
        Weight [layers, K] and bias [layers] of the logits: above 0 for malicious.
    """
    mean = states.mean(1, keepdim=True)
    std = states.std(1, keepdim=True).clamp(min=1e-6)
    x = (states - mean) / std
    weight = torch.zeros(len(x), x.shape[2], 1, requires_grad=True)
    bias = torch.zeros(len(x), 1, 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        fit = _log_loss((x @ weight + bias)[:, :, 0], malicious).sum()
        loss = fit + PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = weight.detach().mT / std
    return weight[:, 0], (bias.detach() - (weight * mean).sum(2, keepdim=True))[:, 0, 0]


def probe_losses(states: Tensor, malicious: Tensor) -> Tensor:
    """Cross-validated log loss (nats) of a linear classifier on each layer [layers].

    Args:
        states: [layers, prompts, hidden].
        malicious: bool [prompts].

    Source: MoGU v2, arXiv 2509.06807: routers go where security is most classifiable.
    """
    order = torch.randperm(len(malicious), generator=torch.Generator().manual_seed(0))
    logits = torch.zeros(states.shape[:2])
    for fold in order.tensor_split(FOLDS):
        rest = torch.ones(len(malicious), dtype=torch.bool).index_fill(0, fold, False)
        weight, bias = probe(states[:, rest], malicious[rest])
        logits[:, fold] = (states[:, fold] @ weight[:, :, None])[:, :, 0] + bias[:, None]
    return _log_loss(logits, malicious)


def best_layers(losses: Tensor, count: int) -> list[int]:
    """The `count` layers with the least loss, in order.

    Raises:
        ValueError: there are fewer layers.
    """
    if not 1 <= count <= len(losses):
        raise ValueError(f"layers={count}: the model has {len(losses)}")
    return sorted(losses.topk(count, largest=False).indices.tolist())


def _log_loss(logits: Tensor, malicious: Tensor) -> Tensor:
    """The log loss [layers] of logits [layers, prompts], as if both classes were as large."""
    target = malicious.to(logits.dtype)
    share = target.mean()
    weight = torch.where(malicious, 0.5 / share, 0.5 / (1 - share)).expand_as(logits)
    losses = F.binary_cross_entropy_with_logits(
        logits, target.expand_as(logits), weight, reduction="none"
    )
    return losses.mean(1)
