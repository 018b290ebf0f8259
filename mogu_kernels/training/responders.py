"""Stage 1: the glad and the unwilling responder, as PEFT LoRA adapters."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from mogu_kernels.training.batches import Item, Packer
from mogu_kernels.training.config import ResponderConfig
from mogu_kernels.training.objectives import ResponderObjective, frozen
from mogu_kernels.training.trainer import run_stage, save_adapter

WANTED = {"glad": "affirmation", "unwill": "rejection"}


def train_responder(
    name: str,
    model: Any,
    train: Sequence[Sequence[Item]],
    validation: Sequence[Sequence[Item]],
    config: ResponderConfig,
    folder: str | os.PathLike,
    *,
    target_modules: Sequence[str] = ("o_proj",),
    layers: Sequence[int] | None = None,
    pad_token_id: int,
    seed: int = 0,
) -> dict[str, float]:
    """Train one responder on malicious prompts and write its PEFT folder.

    Args:
        name: "glad" (usable: affirms) or "unwill" (safe: rejects).
        model: the base, a Hugging Face causal language model; it is left as it was.
        train: malicious prompts with (rejection, affirmation), as `items.pairs` makes them.
        validation: likewise; may be empty.
        config: of the stage.
        folder: `folder/adapter` is written, the trainer's checkpoints go to `folder/steps`.
        target_modules: ends of the names of the projections.
        layers: numbers of the layers that get an adapter; None for all.
        pad_token_id: of the tokenizer.
        seed: of the adapter's first weights, of the order and of dropout.

    Returns:
        The last metrics: loss, both cross entropies, the best validation loss.

    Source: MoGU, arXiv 2405.14488, section 3.1.
    """
    torch.manual_seed(seed)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]  # 16.0 is fine
        lora_dropout=config.dropout,
        target_modules=list(target_modules),
        layers_to_transform=None if layers is None else list(layers),
    )
    with adapter(model, lora) as adapted:
        metrics = run_stage(
            ResponderObjective(adapted, WANTED[name]),
            train,
            validation,
            Packer(pad_token_id, model.dtype),
            config,
            Path(folder) / "steps",
            seed=seed,
            title=name,
        )
        save_adapter(adapted, Path(folder) / "adapter")
    return metrics


@contextlib.contextmanager
def adapter(model: Any, config: peft.PeftConfig) -> Iterator[Any]:
    """`model` with a PEFT adapter that alone is trainable; afterwards it is as it was."""
    with frozen(model):
        with warnings.catch_warnings():
            # peft asks transformers for an attribute by its old name
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is dep", FutureWarning)
            adapted: Any = peft.get_peft_model(model, config)
        try:
            yield adapted
        finally:
            if not config.is_prompt_learning:
                adapted.unload()
