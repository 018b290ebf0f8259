"""The three systems that are compared: base, the published procedure, and ours."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import mogu_kernels as mk
import reference
from demo.published import published_model
from demo.smollm2 import load_smollm2
from mogu_kernels.hf import seeded_checkpoint

NAMES = ("base", "published", "ours")
TARGETS = ("o_proj",)
STRENGTH = 0.5  # of the seeded experts: enough to change the routed tokens
CHECKPOINT = Path("out/seeded-checkpoint")  # what ours is loaded from: folded, 2.3 MB


@dataclasses.dataclass
class System:
    """A way to answer: `generate(input_ids, new_tokens)` -> [1, tokens + new tokens], greedy."""

    name: str
    generate: Callable[[Tensor, int], Tensor]
    models: list[nn.Module]

    @property
    def parameters(self) -> int:
        """Distinct parameters over all the models that it holds."""
        distinct = {p.data_ptr(): p.numel() for model in self.models for p in model.parameters()}
        return sum(distinct.values())

    def timed(self, input_ids: Tensor, new_tokens: int) -> tuple[float, Tensor]:
        """(seconds, tokens)."""
        start = time.perf_counter()
        tokens = self.generate(input_ids, new_tokens)
        return time.perf_counter() - start, tokens


def build(name: str, stop: bool = True) -> System:
    """One system on a model of its own; `stop=False` ignores the end of the answer, for timing."""
    model, _ = load_smollm2()
    end = model.generation_config.eos_token_id if stop else None
    if name == "base":

        def generate(input_ids, new_tokens):
            return model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=end,
            )

        return System(name, generate, [model])
    if name == "published":
        routed = published_model(model, seeded(model))

        def generate(input_ids, new_tokens):
            ends = () if end is None else (end,)
            return reference.mogu_generate(routed, model, input_ids, new_tokens, ends)

        return System(name, generate, [routed, model])
    if not CHECKPOINT.is_dir():
        mk.save_checkpoint(seeded(model).folded(), CHECKPOINT)
    mk.attach(model, CHECKPOINT)

    def generate(input_ids, new_tokens):
        return mk.generate(
            model, input_ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=end
        )

    return System(name, generate, [model])


def seeded(model: nn.Module) -> mk.MoGUCheckpoint:
    """Random experts and published routers for every target of `model`."""
    return seeded_checkpoint(model, TARGETS, strength=STRENGTH)
