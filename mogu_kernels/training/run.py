"""A whole run: two responders, then the routers, each stage resumed where it was stopped."""

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mogu_kernels.checkpoint import (
    MoGUCheckpoint,
    read_json,
    save_checkpoint,
    write_folder,
)
from mogu_kernels.training.config import TrainingConfig
from mogu_kernels.training.data import Example, balance
from mogu_kernels.training.items import Encoder, couples, pairs
from mogu_kernels.training.probe import best_layers, last_hidden_states, probe_losses
from mogu_kernels.training.responders import train_responder
from mogu_kernels.training.routers import train_routers
from mogu_kernels.training.trainer import on_main_process


def train(
    config: TrainingConfig,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    folder: str | os.PathLike,
    *,
    validation: Sequence[Example] = (),
    provenance: dict[str, Any] | None = None,
) -> MoGUCheckpoint:
    """Train a MoGU of `model` and write its checkpoint to `folder/checkpoint`.

    A run that was killed goes on where its last whole step was saved; on a CPU the result has the
    same bytes. Delete `folder` to begin anew.

    Args:
        config: of the run.
        model: a Hugging Face causal language model; it is left as it was.
        tokenizer: its tokenizer.
        examples: of both classes.
        folder: `glad/adapter` and `unwill/adapter` (PEFT), `checkpoint`, and each stage's steps.
        validation: of both classes, for the early stop.
        provenance: added to that of the checkpoint, such as hashes of the data.

    Raises:
        ValueError: the data do not fit, or `folder` is of a run of another config, data or model.
    """
    folder = Path(folder)
    encoder = Encoder(
        tokenizer,
        max_prompt_tokens=config.max_prompt_tokens,
        max_response_tokens=config.max_response_tokens,
        template=config.template,
    )
    seed = config.seed
    own, watched = pairs(examples, encoder, seed), pairs(validation, encoder, seed)
    both = couples(examples, encoder, seed)  # before anything is trained: they are checked here
    watched_both = couples(validation, encoder, seed) if validation else []
    same_run(folder, dataclasses.asdict(config), [*examples, *validation], model)
    layers = None
    if config.router.layers is not None:
        layers = most_separable(model, examples, encoder, config)
    metrics = {}
    for name in ("glad", "unwill"):
        metrics[name] = train_responder(
            name,
            model,
            own,
            watched,
            getattr(config, name),
            folder / name,
            target_modules=config.target_modules,
            layers=layers,
            pad_token_id=encoder.pad_token_id,
            seed=seed,
        )
    responders = {name: folder / name / "adapter" for name in metrics}
    checkpoint, metrics["router"] = train_routers(
        model,
        responders,
        both,
        watched_both,
        config.router,
        folder / "router" / "steps",
        pad_token_id=encoder.pad_token_id,
        routed_tokens=config.routed_tokens,
        seed=seed,
    )
    about = {"trained": True, "config": dataclasses.asdict(config), "metrics": metrics}
    if layers is not None:
        about["layers"] = layers
    named = dataclasses.replace(
        checkpoint.config, base_model=config.model, provenance=about | (provenance or {})
    )
    checkpoint = MoGUCheckpoint(named, checkpoint.tensors)
    with on_main_process() as here:
        if here:
            save_checkpoint(checkpoint, folder / "checkpoint")
    return checkpoint


def most_separable(
    model: Any, examples: Sequence[Example], encoder: Encoder, config: TrainingConfig
) -> list[int]:
    """The layers that MoGU v2 routes: those that tell the classes of `examples` apart best."""
    own = balance(examples, random.Random(config.seed))
    prompts = [encoder(example.instruction, "")[0] for example in own]
    states = last_hidden_states(model, prompts, encoder.pad_token_id)
    losses = probe_losses(states, torch.tensor([example.malicious for example in own]))
    return best_layers(losses, config.router.layers or 0)


def same_run(
    folder: Path, settings: dict[str, Any], examples: Sequence[Example], model: Any
) -> None:
    """Note in `folder` what its steps depend on.

    Raises:
        ValueError: it holds the steps of a run that depended on something else.
    """
    text = json.dumps([[e.instruction, e.response, e.malicious] for e in examples])
    shape = {key: value for key, value in model.config.to_dict().items() if key[0] != "_"}
    own = settings | {
        "examples": hashlib.sha256(text.encode()).hexdigest(),
        "model_config": hashlib.sha256(repr(sorted(shape.items())).encode()).hexdigest(),
    }
    own = json.loads(json.dumps(own))  # as it will be read
    path = folder / "run.json"
    with on_main_process() as here:
        if here and not path.is_file():
            write_folder(folder, {path.name: own})
    noted = read_json(path)
    if differing := sorted(key for key in noted | own if noted.get(key) != own.get(key)):
        raise ValueError(
            f"{folder} holds a run with another {', '.join(differing)}: delete it or take another"
        )
