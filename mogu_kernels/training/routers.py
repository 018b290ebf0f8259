"""Stage 2: the routers, with both responders frozen.

For MoGU v2 an update of the routed projections is trained along.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mogu_kernels.checkpoint import MoGUCheckpoint
from mogu_kernels.convert import from_peft
from mogu_kernels.hf import attach, detach
from mogu_kernels.modules import MoGULinear
from mogu_kernels.router import Router
from mogu_kernels.state import routed_modules
from mogu_kernels.training.batches import Item, Packer
from mogu_kernels.training.config import RouterConfig
from mogu_kernels.training.objectives import RouterObjective, frozen
from mogu_kernels.training.trainer import run_stage


def train_routers(
    model: Any,
    responders: Mapping[str, str | os.PathLike],
    train: Sequence[Sequence[Item]],
    validation: Sequence[Sequence[Item]],
    config: RouterConfig,
    folder: str | os.PathLike,
    *,
    pad_token_id: int,
    routed_tokens: int | None = 5,
    seed: int = 0,
) -> tuple[MoGUCheckpoint, dict[str, float]]:
    """Train a router for every projection that a responder adapts.

    Args:
        model: the base, a Hugging Face causal language model; it is left as it was.
        responders: PEFT folders of "glad" and "unwill".
        train: couples of one malicious and one benign sample, as `items.couples` makes them.
        validation: likewise; may be empty.
        config: of the stage.
        folder: of the trainer's checkpoints.
        pad_token_id: of the tokenizer.
        routed_tokens: answer tokens that are routed later on.
        seed: of the routers' first weights and of the order.

    Returns:
        The checkpoint with routers folded, and the last metrics.

    Source: MoGU, arXiv 2405.14488, section 3.2; for `backbone_rank` MoGU v2, arXiv 2509.06807.
    """
    architecture = type(model).__name__
    start = from_peft(responders, architecture=architecture)  # of modules and widths
    torch.manual_seed(seed)
    routers = {}
    for module in start.modules:
        _, _, width = start.tensors[f"{module}.lora_A"].shape
        router = Router(width, start.config.num_experts, config.hidden)
        routers[module] = {f"router.{k}": v.detach() for k, v in router.named_parameters()}
    checkpoint = from_peft(
        responders,
        architecture=architecture,
        routers=routers,
        gate=config.gate,
        routed_tokens=routed_tokens,
    )
    with frozen(model):
        attach(model, checkpoint, trainable=True)
        try:
            for module in routed_modules(model).values():
                module.lora_A.requires_grad_(False)
                module.lora_B.requires_grad_(False)
                if config.backbone_rank:
                    _add_backbone(module, config.backbone_rank)
            metrics = run_stage(
                RouterObjective(model, checkpoint.config.expert_names, config.gate_loss_weight),
                train,
                validation,
                Packer(pad_token_id, model.dtype),
                config,
                Path(folder),
                seed=seed,
                title="routers",
            )
            trained = _trained(model, checkpoint, config.backbone_rank).folded()
            trained = _leaning(trained, config.refusal_bias)
        finally:
            detach(model)
    return trained, metrics


class _WithBackbone(nn.Module):
    """lora_A or lora_B of all experts, with the projection's own update appended to each.

    An update B_0 A_0 of the base is weighed by the total of the gates, as the base is. So are r_0
    more ranks that all experts have in common: the kernels and the checkpoint need nothing new.

    Args:
        shared: [r_0, K] or [N, r_0].
        dim: the axis of the ranks in the stacked tensor.
    """

    def __init__(self, shared: Tensor, dim: int):
        super().__init__()
        self.shared, self.dim = nn.Parameter(shared), dim

    def forward(self, experts: Tensor) -> Tensor:
        shared = self.shared.to(experts.dtype).expand(len(experts), *self.shared.shape)
        return torch.cat([experts, shared], dim=self.dim)


def _add_backbone(module: MoGULinear, rank: int) -> None:
    """Let `module` train an update of its base, zero at first."""
    K, N = module.in_features, module.out_features
    # fp32 whatever the model has: steps of AdamW are lost in half precision
    options = {"dtype": torch.float32, "device": module.lora_A.device}
    down = torch.empty(rank, K, **options).uniform_(-1, 1) * K**-0.5
    parametrize.register_parametrization(module, "lora_A", _WithBackbone(down, 1), unsafe=True)
    up = torch.zeros(N, rank, **options)
    parametrize.register_parametrization(module, "lora_B", _WithBackbone(up, 2), unsafe=True)


def _trained(model: Any, start: MoGUCheckpoint, backbone_rank: int) -> MoGUCheckpoint:
    """The checkpoint `start` with what the routed modules of `model` hold now."""
    config, tensors = start.config, {}
    for name, module in routed_modules(model).items():
        tensors[f"{name}.lora_A"] = module.lora_A.detach().clone()
        tensors[f"{name}.lora_B"] = module.lora_B.detach().clone()
        own = module.router.named_parameters()
        tensors |= {f"{name}.router.{key}": p.detach().clone() for key, p in own}
    if backbone_rank:
        rank = config.rank + backbone_rank
        scaling = config.scaling
        config = dataclasses.replace(
            config,
            ranks=(rank,) * config.num_experts,
            lora_alpha=tuple(s * (rank**0.5 if config.rslora else rank) for s in scaling),
        )
    return MoGUCheckpoint(config, tensors)


def _leaning(folded: MoGUCheckpoint, bias: float) -> MoGUCheckpoint:
    """The checkpoint with every unwilling gate's logit raised, and every glad one's lowered."""
    steps = {"unwill": bias, "glad": -bias}
    lean = torch.tensor([steps[name] for name in folded.config.expert_names])
    tensors = {
        name: tensor + lean if name.endswith(".gate_bias") else tensor
        for name, tensor in folded.tensors.items()
    }
    return MoGUCheckpoint(folded.config, tensors)
