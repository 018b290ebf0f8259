"""Everything that a training run is told, in one file of YAML or JSON."""

import contextlib
import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any

CHOICES = {
    "template": ("chat", "llama2"),
    "gate": ("sigmoid", "softmax"),
    "schedule": ("constant", "linear", "cosine"),
}
# of the settings that are numbers
MAY_BE_ZERO = (
    "seed",
    "routed_tokens",
    "patience",
    "max_grad_norm",
    "dropout",
    "gate_loss_weight",
    "backbone_rank",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """How one stage is stepped, as the trainer of Hugging Face understands it.

    Attributes:
        learning_rate: of AdamW.
        steps: optimiser steps; None for `epochs` instead.
        epochs: passes over the items.
        batch: items in one forward pass of each process.
        accumulation: forward passes in one optimiser step.
        schedule: of the learning rate: "constant", or to 0 at the end: "linear", "cosine".
        max_grad_norm: longer gradients are cut to this; 0 for never.
        save_steps: steps between two checkpoints, and between two looks at the validation set.
        patience: looks without improvement before it stops; 0 for never.
        gradient_checkpointing: keep only what enters each layer for the backward pass, which
            computes the rest once more: less memory, more time, the same numbers.
    """

    learning_rate: float
    steps: int | None = None
    epochs: float = 10.0
    batch: int = 1
    accumulation: int = 1
    schedule: str = "constant"
    max_grad_norm: float = 1.0
    save_steps: int = 10
    patience: int = 0
    gradient_checkpointing: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResponderConfig(StageConfig):
    """One responder. Defaults as published: lr 5e-5, 10 epochs, eight pairs a step.

    Attributes:
        rank: r.
        lora_alpha: scaling = lora_alpha / rank.
        dropout: on what enters lora_A, in training.
    """

    learning_rate: float = 5e-5
    batch: int = 8
    rank: int = 8
    lora_alpha: float = 16.0
    dropout: float = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig(StageConfig):
    """The routers. Defaults as published: lr 5e-4, 16 samples a step, 10 epochs, lambda 2.

    Items are couples of one malicious and one benign sample, so a batch of 1 has two samples.

    Attributes:
        hidden: width of the router's first linear.
        gate: "sigmoid" (published) or "softmax".
        gate_loss_weight: lambda.
        refusal_bias: added to the unwilling gate's logit and taken from the glad one's when
            training is over: more of it refuses more, of both classes, less than 0 refuses less;
            0 as published.
        layers: MoGU v2: how many layers are routed, those whose hidden states tell the classes
            apart best; None routes all, as v1.
        backbone_rank: MoGU v2: rank of an update of the routed projections themselves that is
            trained along with the routers; 0 keeps them frozen, as v1.
    """

    learning_rate: float = 5e-4
    accumulation: int = 8
    hidden: int = 512
    gate: str = "sigmoid"
    gate_loss_weight: float = 2.0
    refusal_bias: float = 0.0
    layers: int | None = None
    backbone_rank: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A whole run: two responders, then the routers.

    Attributes:
        model: a folder or a hub id.
        data: files of examples (see `training.data.read_examples`).
        validation: likewise; each stage keeps its best state on it, and may stop (`patience`).
        target_modules: ends of the names of the projections that are routed.
        routed_tokens: answer tokens that are routed, 5 as published.
        template: "chat" (the tokenizer's) or "llama2" (that of the published files).
        max_prompt_tokens: longer instructions are cut; with answers 1,024 in all as published.
        max_response_tokens: longer answers are cut.
        seed: of everything random.
        glad: the usable responder.
        unwill: the safe one.
        router: the routers.
    """

    model: str = ""
    data: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    target_modules: tuple[str, ...] = ("o_proj",)
    routed_tokens: int | None = 5
    template: str = "chat"
    max_prompt_tokens: int = 512
    max_response_tokens: int = 512
    seed: int = 0
    glad: ResponderConfig = ResponderConfig()
    unwill: ResponderConfig = ResponderConfig()
    router: RouterConfig = RouterConfig()


def load_config(path: str | Path) -> TrainingConfig:
    """Read a run's config from a .yaml or .json file; what it does not name is as published.

    Raises:
        ValueError: an unknown key or choice, a number out of range, or the file is no mapping.
        TypeError: a value of another type.
    """
    import yaml

    text = Path(path).read_text(encoding="utf-8")
    try:
        values = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    return _build(TrainingConfig, {} if values is None else values, str(path))


def _build(kind: type, values: Any, where: str) -> Any:
    """A dataclass from a mapping, checked field by field."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is a {type(values).__name__}: take a mapping of settings")
    hints = typing.get_type_hints(kind)
    if unknown := sorted(map(str, values.keys() - hints)):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; take any of {', '.join(hints)}")
    return kind(**{name: _value(hints[name], v, f"{where}: {name}") for name, v in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the hint asks for it."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise TypeError(f"{where} is {value!r}: take a list of texts")
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in kinds and type(value) in (int, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # 5e-4 is a text to YAML
    if type(value) not in kinds and not (value is None and types.NoneType in kinds):
        names = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
        raise TypeError(f"{where} is {value!r}: take {names}")
    name = where.rpartition(" ")[2]
    if value not in CHOICES.get(name, (value,)):
        raise ValueError(f"{where} is {value!r}: take one of {', '.join(CHOICES[name])}")
    least = 0 if name in MAY_BE_ZERO else 1 if isinstance(value, int) else 1e-12
    if isinstance(value, int | float) and not isinstance(value, bool):
        if name == "refusal_bias" and math.isfinite(value):
            return value
        if not least <= value < math.inf:
            raise ValueError(f"{where} is {value}: take {'0 or more' if not least else 'more'}")
        if name == "dropout" and value >= 1:
            raise ValueError(f"{where} is {value}: take less than 1")
    return value
