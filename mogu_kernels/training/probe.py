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
PENALTY = 1e-2  # on the squared weights; hidden states are standardised


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


def probe_losses(states: Tensor, malicious: Tensor) -> Tensor:
    """Cross-validated log loss (nats) of a linear classifier on each layer [layers].

    Args:
        states: [layers, prompts, hidden].
        malicious: bool [prompts].

    Source: MoGU v2, arXiv 2509.06807: routers go where security is most classifiable.
    """
    order = torch.randperm(len(malicious), generator=torch.Generator().manual_seed(0))
    losses = torch.zeros(len(states), dtype=torch.float64)
    for fold in order.tensor_split(FOLDS):
        rest = torch.ones(len(malicious), dtype=torch.bool).index_fill(0, fold, False)
        mean = states[:, rest].mean(1, keepdim=True)
        x = (states - mean) / states[:, rest].std(1, keepdim=True).clamp(min=1e-6)
        y = malicious.to(x.dtype).expand(len(states), -1)
        weight, bias = _classifiers(x[:, rest], y[:, rest])
        logits = (x[:, fold] @ weight[:, :, None])[:, :, 0] + bias
        own = F.binary_cross_entropy_with_logits(logits, y[:, fold], reduction="none")
        losses += own.sum(1).double() / len(malicious)
    return losses


def best_layers(losses: Tensor, count: int) -> list[int]:
    """The `count` layers with the least loss, in order.

    Raises:
        ValueError: there are fewer layers.
    """
    if not 1 <= count <= len(losses):
        raise ValueError(f"layers={count}: the model has {len(losses)}")
    return sorted(losses.topk(count, largest=False).indices.tolist())


def _classifiers(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """One logistic regression a layer: weight [layers, hidden] and bias [layers, 1]."""
    weight = torch.zeros(x.shape[0], x.shape[2], requires_grad=True)
    bias = torch.zeros(x.shape[0], 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = (x @ weight[:, :, None])[:, :, 0] + bias
        fit = F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(1).sum()
        loss = fit + PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
