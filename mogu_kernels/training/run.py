"""A whole run: two responders, then the routers, each stage resumed where it was stopped."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from mogu_kernels.checkpoint import (
    MoGUCheckpoint,
    read_json,
    save_checkpoint,
    write_folder,
)
from mogu_kernels.hf import target_linears
from mogu_kernels.training.config import TrainingConfig
from mogu_kernels.training.data import Example
from mogu_kernels.training.items import Encoder, couples, pairs
from mogu_kernels.training.probe import FOLDS, best_layers, last_hidden_states, probe_losses
from mogu_kernels.training.responders import train_responder
from mogu_kernels.training.routers import train_routers
from mogu_kernels.training.trainer import layers_to_recompute, on_main_process

# on the steps: it comes after them; the same numbers, computed once more
WITHOUT_EFFECT = ("refusal_bias", "gradient_checkpointing")


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

    A run that was killed goes on from its last saved step (every `save_steps`); on a CPU the
    result has the same bytes. Each stage notes what it depends on in a `run.json`: with other
    settings of the routers the responders of `folder` stay.

    Args:
        config: of the run.
        model: a Hugging Face causal language model; it is left as it was.
        tokenizer: its tokenizer.
        examples: of both classes.
        folder: `glad/adapter` and `unwill/adapter` (PEFT), `checkpoint`, and each stage's steps.
        validation: of both classes, for the early stop.
        provenance: added to that of the checkpoint, such as hashes of the data.

    Raises:
        ValueError: the config does not fit the model or the data, or a stage in `folder` was run
            with other settings, data or model.
    """
    folder = Path(folder)
    target_linears(model, config.target_modules)  # before anything is written
    for name in ("glad", "unwill", "router"):
        if not validation and (patience := getattr(config, name).patience):
            raise ValueError(f"{name}: patience={patience} needs validation examples: give some")
        if getattr(config, name).gradient_checkpointing:
            layers_to_recompute(model)
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
    every = [*examples, *validation]
    malicious = [example for example in every if example.malicious]
    layers = None
    if config.router.layers is not None:
        layers = most_separable(model, examples, encoder, config)
    shared = {"target_modules": config.target_modules, "layers": layers, "seed": seed}
    shared |= encoder.options
    metrics = {}
    for name in ("glad", "unwill"):
        own_settings = shared | dataclasses.asdict(getattr(config, name))
        same_run(folder / name, own_settings, malicious, model)
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
    settings = shared | dataclasses.asdict(config.router)
    settings["responders"] = {name: _weights_sha256(path) for name, path in responders.items()}
    same_run(folder / "router", settings, every, model)
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
    malicious = torch.tensor([example.malicious for example in examples])
    if (fewest := min(int(malicious.sum()), int((~malicious).sum()))) < FOLDS:
        raise ValueError(
            f"{fewest} examples of a class: the probe for router.layers needs {FOLDS} of each"
        )
    prompts = [encoder(example.instruction, "")[0] for example in examples]
    states = last_hidden_states(model, prompts, encoder.pad_token_id)
    return best_layers(probe_losses(states, malicious), config.router.layers or 0)


def same_run(
    folder: Path, settings: dict[str, Any], examples: Sequence[Example], model: Any
) -> None:
    """Note in `folder` what its steps depend on.

    Raises:
        ValueError: it holds the steps of a run that depended on something else.
    """
    text = json.dumps([[e.instruction, e.response, e.malicious] for e in examples])
    own = {key: value for key, value in settings.items() if key not in WITHOUT_EFFECT} | {
        "examples": hashlib.sha256(text.encode()).hexdigest(),
        "model": fingerprint(model),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
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


def fingerprint(model: Any) -> str:
    """SHA-256 of every parameter's name, shape and dtype, and of up to 64 values of each."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        if type(parameter.data) is torch.Tensor:  # a quantised weight has no values of its own
            values = parameter.detach().flatten()
            some = values[:: max(1, len(values) // 64)][:64]
            digest.update(repr(some.double().tolist()).encode())
    return digest.hexdigest()


def _weights_sha256(adapter: Path) -> str:
    """Of a PEFT folder's weights."""
    return hashlib.sha256((adapter / SAFETENSORS_WEIGHTS_NAME).read_bytes()).hexdigest()
