"""The published procedure with our checkpoints: a second model of `reference` projections."""

import copy

import torch
from torch import nn

import reference
from mogu_kernels import MoGUCheckpoint


def published_model(model: nn.Module, checkpoint: MoGUCheckpoint) -> nn.Module:
    """A complete copy of `model` with the literal projections, unfolded routers and all."""
    projections = {
        name: published_projection(
            model.get_submodule(name), checkpoint.module_tensors(name), checkpoint.config
        )
        for name in checkpoint.modules
    }
    return reference.route(model, projections)


def published_projection(base: nn.Module, tensors, config) -> reference.RoutedProjection:
    """One projection; the two experts are told apart by name, never by position."""
    unwill, glad = (config.expert_names.index(name) for name in ("unwill", "glad"))
    like = {"device": base.weight.device, "dtype": base.weight.dtype}

    def lora(e):
        module = reference.LoRA(
            base.in_features, base.out_features, config.ranks[e], config.lora_alpha[e]
        )
        rank = config.ranks[e]
        _fill(module.lora_A.weight, tensors["lora_A"][e, :rank])
        _fill(module.lora_B.weight, tensors["lora_B"][e, :, :rank])
        return module

    def router(e):
        module = reference.Router(base.in_features, config.router_hidden)
        for name, parameter in module.named_parameters():
            _fill(parameter, tensors[f"router.{name}"][e])
        return module

    projection = reference.RoutedProjection(
        copy.deepcopy(base), lora(unwill), lora(glad), router(unwill), router(glad), config.gate
    )
    return projection.to(**like).eval().requires_grad_(False)


def _fill(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """In the checkpoint's own dtype, which no fp32 default may round."""
    parameter.data = values.clone()
