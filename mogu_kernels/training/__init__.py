"""Training of responders and routers: make a MoGU of your own model."""

from typing import TYPE_CHECKING, Any

from mogu_kernels.training.config import (
    ResponderConfig,
    RouterConfig,
    StageConfig,
    TrainingConfig,
    load_config,
)
from mogu_kernels.training.data import Example, read_examples

if TYPE_CHECKING:
    from mogu_kernels.training.run import train

__all__ = [
    "Example",
    "ResponderConfig",
    "RouterConfig",
    "StageConfig",
    "TrainingConfig",
    "load_config",
    "read_examples",
    "train",
]


def __getattr__(name: str) -> Any:
    """`train`, on demand: data and configs are read without transformers and peft."""
    if name == "train":
        from mogu_kernels.training.run import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
