"""What a checkpoint holds, and how far its folded routers are from their factors."""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mogu_kernels.checkpoint import MoGUCheckpoint, load_checkpoint

HIDDEN_STATES = 64  # random ones, on which a folded router is held against its factors
SEED = 0


def inspect_checkpoint(
    checkpoint: MoGUCheckpoint | str | os.PathLike,
    *,
    each: Callable[[list[str]], Iterable[str]] = iter,
) -> dict[str, Any]:
    """Describe a checkpoint in JSON types.

    Args:
        checkpoint: a folder, or what `load_checkpoint` returned.
        each: wraps the list of module names, for a progress bar: large "mlp" routers take seconds.

    Returns:
        Its config (`base_model`, `architecture`, `target_modules`, `experts` with rank, lora_alpha
        and scaling, `gate`, `router`, `routed_tokens`, `provenance`), `layers`, `dtype`, and by
        part (lora_A, lora_B, router) `parameters` and `bytes` as they lie on the disk. `modules`
        has one entry per routed projection: by expert the norm of its update
        `scaling * ||lora_B lora_A||`, of its folded gate_weight, and the gate at hidden states of
        zero; for an "mlp" router the largest difference of a gate logit between the fold, rounded
        to fp32, and the three linears, both evaluated in fp64 on random normal hidden states.
        `fold` is the worst module's, None for a router that is folded already.

    Raises:
        ValueError: the folder or its contents are damaged.
    """
    if not isinstance(checkpoint, MoGUCheckpoint):
        checkpoint = load_checkpoint(checkpoint)
    checkpoint.validate()
    config = checkpoint.config
    parts = {"lora_A": [], "lora_B": [], "router": []}
    for name, tensor in checkpoint.tensors.items():
        parts[next((part for part in parts if name.endswith(part)), "router")].append(tensor)
    modules = [_inspect_module(checkpoint, name) for name in each(checkpoint.modules)]
    return {
        "base_model": config.base_model,
        "architecture": config.architecture,
        "target_modules": list(config.target_modules),
        "layers": sorted({m["layer"] for m in modules if m["layer"] is not None}),
        "experts": [
            {"name": name, "rank": rank, "lora_alpha": alpha, "scaling": scaling}
            for name, rank, alpha, scaling in zip(
                config.expert_names, config.ranks, config.lora_alpha, config.scaling, strict=True
            )
        ],
        "gate": config.gate,
        "router": config.router,
        "routed_tokens": config.routed_tokens,
        "parameters": {part: sum(t.numel() for t in own) for part, own in parts.items()},
        "bytes": {part: sum(t.nbytes for t in own) for part, own in parts.items()},
        "dtype": {
            part: sorted({str(t.dtype).removeprefix("torch.") for t in own})
            for part, own in parts.items()
        },
        "provenance": config.provenance,
        "fold": None if config.router == "linear" else _worst(modules),
        "modules": modules,
    }


def in_words(found: dict[str, Any]) -> dict[str, str]:
    """What `inspect_checkpoint` returned, as one finding by subject."""
    layers, fold = found["layers"], found["fold"]
    span = f" ({layers[0]} to {layers[-1]})" if layers else ""
    routed = found["routed_tokens"]
    words = {
        "base model": f"{found['base_model']} ({found['architecture']})",
        "projections": f"{len(found['modules'])} ({', '.join(found['target_modules'])})",
        "layers": f"{len(layers)}{span}",
    }
    for expert in found["experts"]:
        words[f"expert {expert['name']}"] = (
            f"rank {expert['rank']}, lora_alpha {expert['lora_alpha']:g}, "
            f"scaling {expert['scaling']:g}"
        )
    words["gate"] = found["gate"]
    words["router"] = f"{found['router']}{' (folded already)' if fold is None else ''}"
    if fold is not None:
        words["fold"] = (
            f"gate logits differ from the three linears' by at most {fold['logit_difference']:.1e} "
            f"({fold['module']}, {fold['hidden_states']} random hidden states)"
        )
    for name in (expert["name"] for expert in found["experts"]):
        for key, subject in (("update_norm", "update"), ("gate_weight_norm", "gate_weight")):
            norms = [module[key][name] for module in found["modules"]]
            words[f"{subject} norm, {name}"] = f"{min(norms):.3g} to {max(norms):.3g}"
    words["routed tokens"] = "all" if routed is None else str(routed)
    parameters, size = found["parameters"], found["bytes"]
    for part, own in (*parameters.items(), ("total", sum(parameters.values()))):
        nbytes = size.get(part, sum(size.values()))
        dtype = ", ".join(found["dtype"].get(part, ()))
        words[f"size, {part}"] = (
            f"{own:,} parameters, {nbytes:,} bytes{f', {dtype}' if dtype else ''}"
        )
    words["provenance"] = json.dumps(found["provenance"])
    return words


def _inspect_module(checkpoint: MoGUCheckpoint, name: str) -> dict[str, Any]:
    """The entry of one routed projection."""
    config, tensors = checkpoint.config, checkpoint.module_tensors(name)
    lora_A, lora_B = tensors["lora_A"].double(), tensors["lora_B"].double()
    alone = MoGUCheckpoint(config, {f"{name}.{key}": t for key, t in tensors.items()})
    folded = alone.folded().module_tensors(name)
    gate_weight, gate_bias = folded["gate_weight"].double(), folded["gate_bias"].double()
    # ||B A||^2 = trace(B^T B A A^T): r x r products, never the [out, in] one
    squares = (lora_B.mT @ lora_B * (lora_A @ lora_A.mT)).sum((1, 2)).clamp_min(0)
    norms = torch.tensor(config.scaling, dtype=torch.float64).abs() * squares.sqrt()
    at_zero = gate_bias.softmax(0) if config.gate == "softmax" else gate_bias.sigmoid()
    difference = None
    if config.router == "mlp":
        generator = torch.Generator().manual_seed(SEED)
        shape = HIDDEN_STATES, lora_A.shape[2]
        hidden_states = torch.randn(shape, generator=generator, dtype=torch.float64)
        logits = hidden_states @ gate_weight.T + gate_bias
        difference = float((logits - _unfolded(tensors, hidden_states)).abs().max())

    def by_expert(values: Tensor) -> dict[str, float]:
        return dict(zip(config.expert_names, values.tolist(), strict=True))

    return {
        "name": name,
        "layer": next((int(part) for part in name.split(".") if part.isdigit()), None),
        "in_features": lora_A.shape[2],
        "out_features": lora_B.shape[1],
        "update_norm": by_expert(norms),
        "gate_weight_norm": by_expert(gate_weight.norm(dim=1)),
        "gate_at_zero": by_expert(at_zero),
        "logit_difference": difference,
    }


def _unfolded(tensors: dict[str, Tensor], hidden_states: Tensor) -> Tensor:
    """Gate logits [M, E] of the three linears, one after the other, in fp64."""
    linears = {key: t.double() for key, t in tensors.items() if key.startswith("router.")}
    h = hidden_states @ linears["router.linear_0.weight"].mT  # [E, M, H]
    h = h @ linears["router.linear_1.weight"].mT + linears["router.linear_1.bias"][:, None]
    h = h @ linears["router.linear_2.weight"].mT + linears["router.linear_2.bias"][:, None]
    return h[..., 0].T


def _worst(modules: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the fold differs most, and by how much."""
    worst = max(modules, key=lambda module: module["logit_difference"])
    return {
        "logit_difference": worst["logit_difference"],
        "module": worst["name"],
        "hidden_states": HIDDEN_STATES,
        "seed": SEED,
    }
