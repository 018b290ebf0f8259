"""A model with its loss, as the module that the trainer steps.

Each keeps only what it trains in its `state_dict`: the trainer's checkpoints hold no base weights.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from mogu_kernels.state import record_gates
from mogu_kernels.training.losses import gate_loss, gate_separation, ratio_loss, response_loss


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze what `model` has now; afterwards it is as before, its mode included."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = model.training
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, trainable in before.items():
            parameter.requires_grad_(trainable)
        model.train(training)


class Objective(nn.Module):
    """A language model and what is minimised.

    Args:
        model: parameters that are to be trained have `requires_grad`, the others are frozen.
    """

    # a batch's loss is its mean, which the trainer averages over accumulated batches
    accepts_loss_kwargs = False

    def __init__(self, model: nn.Module):
        """See the class."""
        super().__init__()
        self.model: Any = model

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What is trained, and nothing else."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k in trained}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """What `state_dict` gave; the rest stays."""
        missing = set(self.state_dict()) ^ set(state_dict)
        if missing:
            raise ValueError(f"the saved state and the model differ in {sorted(missing)[:3]}")
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return _IncompatibleKeys([], [])

    def response_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross entropy of every answer [S] of a batch that `Packer` made."""
        logits = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            logits_to_keep=batch["columns"],
            use_cache=False,
        ).logits
        return response_loss(logits.flatten(0, 1)[batch["places"]], batch["labels"])


class ResponderObjective(Objective):
    """CE(wanted) / CE(unwanted) of items with two answers, (rejection, affirmation).

    Args:
        model: with one LoRA adapter.
        wanted: "rejection" (the unwilling responder) or "affirmation" (the glad one).
    """

    def __init__(self, model: nn.Module, wanted: str):
        """See the class."""
        super().__init__(model)
        self.wanted = wanted

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Scalars: `loss`, and the two cross entropies."""
        rejection, affirmation = self.response_losses(batch).view(-1, 2).unbind(1)
        losses = {"rejection": rejection, "affirmation": affirmation}
        wanted = losses.pop(self.wanted)
        (unwanted,) = losses.values()
        loss = ratio_loss(wanted, unwanted)
        return {"loss": loss, "wanted": wanted.mean(), "unwanted": unwanted.mean()}


class ResponseObjective(Objective):
    """CE(response): supervised fine-tuning."""

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Scalars: `loss`."""
        return {"loss": self.response_losses(batch).mean()}


class RouterObjective(Objective):
    """CE(response) + weight * gate loss, of items of both classes.

    Args:
        model: with routed projections.
        names: of the experts.
        gate_loss_weight: lambda, 2.0 as published.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], gate_loss_weight: float):
        """See the class."""
        super().__init__(model)
        self.names, self.gate_loss_weight = names, gate_loss_weight

    def train(self, mode: bool = True) -> "RouterObjective":
        """Dropout is off in this stage, as published."""
        return super().train(False)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Scalars: `loss`, its two parts, and how far the classes' gates are apart."""
        with record_gates(self.model) as gates:
            response = self.response_losses(batch).mean()
        about = (gates.values(), self.names, batch["malicious"], batch["tokens"])
        gate = gate_loss(*about).mean()
        return {
            "loss": response + self.gate_loss_weight * gate,
            "response": response,
            "gate": gate,
            "separation": gate_separation(*about),
        }
