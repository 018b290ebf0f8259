"""A quantised model as vLLM's users have them: a compressed-tensors checkpoint on disk."""

from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def quantise_(model: PreTrainedModel, scheme: str) -> None:
    """Round the weights of all linears but lm_head as `scheme` says; calls round activations too.

    Args:
        model: changed in place; its linears keep their classes and get another forward.
        scheme: a preset of compressed-tensors, such as "W8A8" or "W4A16".
    """
    config = QuantizationConfig(config_groups={scheme: ["Linear"]}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "weight_scale"):
            rows = module.weight.unflatten(1, (module.weight_scale.shape[1], -1))
            low, high = rows.amin(-1), rows.amax(-1)
            scale, _ = calculate_qparams(low, high, module.quantization_scheme.weights)
            module.weight_scale.copy_(scale)


def save_quantised(model: PreTrainedModel, folder: Path) -> None:
    """Write what `quantise_` has made, packed; the model is packed from then on."""
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
