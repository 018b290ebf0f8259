"""SmolLM2 with heads of zeros: the same function, but with heads that two ranks can share."""

import dataclasses
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mogu_kernels import MoGUCheckpoint, load_checkpoint, save_checkpoint

KV_HEADS = 4  # of 3


def save_padded(model_folder: Path, checkpoint_folder: Path, target: Path) -> None:
    """Write `target/model` and `target/checkpoint`, 12 query and 4 key heads for 9 and 3.

    vLLM splits heads evenly over its ranks, and nine are odd. The added heads attend to something,
    but o_proj takes nothing from them.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = model.config
    heads = config.num_attention_heads * KV_HEADS // config.num_key_value_heads
    width = heads * config.head_dim
    padded = LlamaForCausalLM(
        type(config).from_dict(
            config.to_dict() | {"num_attention_heads": heads, "num_key_value_heads": KV_HEADS}
        )
    )
    state = padded.state_dict()
    for name, tensor in model.state_dict().items():
        own = state[name]
        own.zero_()
        own[tuple(slice(size) for size in tensor.shape)] = tensor
    padded.load_state_dict(state)
    padded.generation_config = model.generation_config
    padded.save_pretrained(target / "model")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(target / "model")

    checkpoint = load_checkpoint(checkpoint_folder)
    checkpoint = checkpoint.folded()
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        if name.endswith((".lora_A", ".gate_weight")):
            tensor = torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
        tensors[name] = tensor
    save_checkpoint(
        MoGUCheckpoint(dataclasses.replace(checkpoint.config), tensors), target / "checkpoint"
    )
