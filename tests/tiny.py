"""A random Llama of 105,000 parameters, and checkpoints for it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mogu_kernels import MoGUCheckpoint
from mogu_kernels.hf import seeded_checkpoint

EVERY_TARGET = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# bytes as tokens; grouped queries and another width inside, so no projection is square
SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "initializer_range": 0.2,
}


def llama(dtype=torch.float32, **changes) -> LlamaForCausalLM:
    """The model; `changes` go to its config."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"architectures": ["LlamaForCausalLM"]} | changes)
    return LlamaForCausalLM(config).to(dtype).eval()


def checkpoint(model, target_modules=("o_proj",), **changes) -> MoGUCheckpoint:
    """Strong random experts: a lost gate or a swapped expert changes the answer."""
    return seeded_checkpoint(
        model, target_modules, **{"router_hidden": 16, "strength": 0.5} | changes
    )


def prompt(tokens=9, batch=1, seed=1) -> torch.Tensor:
    """[batch, tokens] of random bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, tokens), generator=generator)
