"""What the operator says in the engine's additional config, and a request in its extra arguments.

Neither imports vLLM: values are checked here, wherever they come from.
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mogu_kernels.checkpoint import MoGUCheckpoint, load_checkpoint

KEY = "mogu"  # of the additional config
ARGUMENT = "mogu_routed_tokens"  # of a request
ALL = "all"
# where each engine counts; not in the config, whose hash names vLLM's cache of compiled graphs
METRICS = "MOGU_METRICS_FOLDER"
THROUGHOUT = 1 << 62  # more tokens than any answer has


@dataclass(frozen=True)
class Settings:
    """What the operator chose.

    Attributes:
        checkpoint: a folder, or an id on the Hugging Face hub, resolved before the engine starts.
        locked: requests may ask for routing throughout, and for nothing else.
    """

    checkpoint: str
    locked: bool = False

    @classmethod
    def of(cls, vllm_config: Any) -> "Settings | None":
        """From a `VllmConfig`; None where no checkpoint is named.

        Raises:
            ValueError: an unknown key.
            TypeError: a value of another type.
        """
        additional = vllm_config.additional_config
        if not isinstance(additional, Mapping) or additional.get(KEY) is None:
            return None
        values: Any = additional[KEY]
        if isinstance(values, str):
            values = {"checkpoint": values}
        if not isinstance(values, Mapping) or not isinstance(values.get("checkpoint"), str):
            raise TypeError(
                f'additional config "{KEY}" is {values!r}: take the checkpoint\'s folder, or '
                '{"checkpoint": folder, "locked": true or false}'
            )
        if unknown := sorted(values.keys() - {"checkpoint", "locked"}):
            raise ValueError(
                f'additional config "{KEY}" has {", ".join(unknown)}: take checkpoint and locked'
            )
        if not isinstance(values.get("locked", False), bool):
            raise TypeError(f'"locked" is {values["locked"]!r}: take true or false')
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What `of` reads."""
        return {"checkpoint": self.checkpoint, "locked": self.locked}

    @property
    def metrics(self) -> str | None:
        """The folder in which each engine of this server counts."""
        return os.environ.get(METRICS)

    def load(self) -> MoGUCheckpoint:
        """The checkpoint with folded routers, read once in a process."""
        return _load(self.checkpoint)

    def routed_tokens(self, extra_args: Mapping[str, Any] | None) -> int:
        """How many answer tokens of a request are routed: 0 for none, `THROUGHOUT` for all."""
        config = self.load().config
        default = THROUGHOUT if config.routed_tokens is None else config.routed_tokens
        asked = requested_tokens(extra_args)
        if asked is None or (self.locked and asked != THROUGHOUT):
            return default
        return asked


def requested_tokens(extra_args: Mapping[str, Any] | None, *, locked: bool = False) -> int | None:
    """What a request asks for; None where it leaves it to the checkpoint.

    Args:
        extra_args: of its `SamplingParams`, which the OpenAI server fills from `vllm_xargs`.
        locked: refuse what the operator has locked.

    Raises:
        ValueError: a malformed value, an unknown argument of ours, or one that is locked.
    """
    own = {key: value for key, value in (extra_args or {}).items() if key.startswith(KEY)}
    if unknown := sorted(own.keys() - {ARGUMENT}):
        raise ValueError(f"unknown argument {', '.join(unknown)}: take {ARGUMENT}")
    if ARGUMENT not in own:
        return None
    value = own[ARGUMENT]
    if value == ALL:
        return THROUGHOUT
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < THROUGHOUT:
        raise ValueError(
            f'{ARGUMENT} is {value!r}: take a number of answer tokens (0: the base model) or "all"'
        )
    if locked:
        raise ValueError(
            f'{ARGUMENT} is {value}, but routing is locked by the operator: leave it out, or "all"'
        )
    return value


@functools.lru_cache(maxsize=2)
def _load(folder: str) -> MoGUCheckpoint:
    checkpoint = load_checkpoint(folder)
    checkpoint.validate()
    return checkpoint.folded()
