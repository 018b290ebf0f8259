"""Checkpoints from PEFT LoRA folders and from the published MoGU files, and back to PEFT.

A PEFT folder says more than a MoGU config can: a scaling of its own for every module. What differs
from the expert's scaling is multiplied into `lora_B`, so that every product stays what it was.
"""

import dataclasses
import math
import os
import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mogu_kernels.checkpoint import (
    DTYPES,
    MoGUCheckpoint,
    MoGUConfig,
    read_json,
    read_tensors,
    short,
    write_folder,
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
ADAPTER_INDEX = "adapter_model.safetensors.index.json"
ADAPTER_PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."

# settings that make an adapter more than scaling * B A, and what to do
REFUSED = {
    "use_dora": "DoRA also rescales the base weight: train with use_dora=False",
    "lora_bias": "MoGU experts have no bias: train with lora_bias=False",
    "modules_to_save": "whole modules cannot be routed: train with modules_to_save=None",
    "fan_in_fan_out": "the base keeps its weight transposed: replace Conv1D by nn.Linear first",
    "target_parameters": "only nn.Linear modules are routed: use target_modules",
    "trainable_token_indices": "embeddings are not routed: train without it",
    "layer_replication": "the base was changed: take one with layers of its own",
    "alora_invocation_tokens": "activated LoRA leaves some tokens out: train plain LoRA",
    "use_qalora": "QALoRA pools the input: train plain LoRA",
    "use_bdlora": "BD-LoRA is block-diagonal: train plain LoRA",
    "arrow_config": "Arrow has routers of its own: export its adapters one by one",
    "monteclora_config": "MonteCLoRA is random: train plain LoRA",
    "kasa_config": "KaSA changes the base weight: train plain LoRA",
}
# the other ways to start subtract something from the base weight, and no tensor tells
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")

# the published names: alpha_ weighs the unwilling responder, beta_ the glad one
OFFICIAL_ROUTERS = {"glad": "beta_", "unwill": "alpha_"}
OFFICIAL_ARCHITECTURES = {"model": "LlamaForCausalLM", "transformer": "FalconForCausalLM"}
ROUTER_TENSORS = (
    "linear_0.weight",
    "linear_1.weight",
    "linear_1.bias",
    "linear_2.weight",
    "linear_2.bias",
)

_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_[AB])(?:\.[^.]+)?\.weight")
_SHARD = re.compile(r"adapter_model-\d{5}-of-\d{5}\.safetensors")
_ROUTER_KEY = re.compile(r"(model|transformer)\.routers\.(\d{1,4})\.(alpha_|beta_)\.(.+)")

# what the pickle inside a `torch.save`d dict of tensors names, and nothing else
_STORAGES = ("FloatStorage", "HalfStorage", "BFloat16Storage", "DoubleStorage")
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
} | {f"torch {storage}" for storage in _STORAGES}
_HIDDEN_GLOBALS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
_MAX_PICKLE_BYTES = 2**22  # that of 80 layers has about 100 kB


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """One PEFT folder: tensors and (rank, lora_alpha) by module."""

    base_model: str
    rslora: bool
    lora_A: dict[str, Tensor]
    lora_B: dict[str, Tensor]
    sizes: dict[str, tuple[int, float]]

    def scaling(self, module: str) -> float:
        rank, alpha = self.sizes[module]
        return alpha / (rank**0.5 if self.rslora else rank)


def from_peft(
    experts: Mapping[str, str | os.PathLike],
    *,
    architecture: str,
    base_model: str | None = None,
    routers: Mapping[str, Mapping[str, Tensor]] | None = None,
    gate: str = "sigmoid",
    routed_tokens: int | None = 5,
) -> MoGUCheckpoint:
    """Make a checkpoint of PEFT LoRA folders, one per expert.

    Any rank, rslora, rank_pattern and alpha_pattern; ranks and modules may differ between experts.
    Nothing is unpickled: only `adapter_model.safetensors` (whole or in shards) is read.

    Without `routers` the experts get a "linear" router of zeros: with the sigmoid gate each weighs
    1/2 for every token, so that of two experts the base keeps its weight of 1 and each responder
    counts half. It is a place to start training from, not a safe model.

    Args:
        experts: folders by expert name, such as {"glad": ..., "unwill": ...}, in the order that
            the checkpoint keeps.
        architecture: of the base model, such as "LlamaForCausalLM".
        base_model: id of the base model; the folders' own if None.
        routers: for every routed module, by its full name, the tensors that `MoGUCheckpoint` lists
            for a "linear" ("gate_weight", "gate_bias") or an "mlp" router ("router.linear_0.weight"
            and so on), stacked over the experts in the order of `experts`.
        gate: "sigmoid" or "softmax".
        routed_tokens: answer tokens that are routed; None routes all.

    Raises:
        ValueError: a file is missing or damaged, an adapter is more than LoRA, the experts do not
            fit each other or the routers.
        TypeError: a value of the wrong type.
    """
    adapters = {name: _read_adapter(Path(folder)) for name, folder in experts.items()}
    provenance = {name: Path(folder).name for name, folder in experts.items()}
    return _stacked(
        adapters,
        routers,
        architecture=architecture,
        base_model=base_model,
        gate=gate,
        routed_tokens=routed_tokens,
        provenance={"imported": "peft", "folders": provenance},
    )


def from_official(
    unwill: str | os.PathLike,
    glad: str | os.PathLike,
    router: str | os.PathLike,
    *,
    architecture: str | None = None,
    base_model: str | None = None,
) -> MoGUCheckpoint:
    """Make a checkpoint of the published files, with the "mlp" router and 5 routed tokens.

    The router is the only pickle that is ever read: with `weights_only=True`, after its pickle was
    found to name nothing but tensors.

    Args:
        unwill: `resp_unwill/N_lora`.
        glad: `resp_glad/N_lora`.
        router: `router_layer/N_router.pth`.
        architecture: of the base model; by the router's names FalconForCausalLM or
            LlamaForCausalLM if None.
        base_model: id of the base model; the folders' own if None.

    Raises:
        ValueError: as `from_peft`; the router is no flat dict of the published tensors, or a layer
            lacks its router or its projection.
        TypeError: a value of the wrong type.

    Source: the released files; there `alpha_` and `lora_0` are the unwilling responder.
    """
    folders = {"glad": Path(glad), "unwill": Path(unwill)}
    adapters = {name: _read_adapter(folder) for name, folder in folders.items()}
    family, layers = _read_router(Path(router))
    return _stacked(
        adapters,
        _official_routers(layers, _one_module_a_layer(adapters), Path(router)),
        architecture=architecture or OFFICIAL_ARCHITECTURES[family],
        base_model=base_model,
        gate="sigmoid",
        routed_tokens=5,
        provenance={
            "imported": "official",
            "folders": {name: folder.name for name, folder in folders.items()},
            "router": Path(router).name,
        },
    )


def to_peft(checkpoint: MoGUCheckpoint, folder: str | os.PathLike) -> dict[str, Path]:
    """Write one PEFT LoRA folder per expert: `folder/glad`, `folder/unwill`.

    `peft.PeftModel.from_pretrained` reads them. Routers are no part of PEFT and are not written:
    `from_peft` makes the same experts of the folders, and takes the routers from `routers`.

    Returns:
        The folders by expert name.

    Raises:
        ValueError: the checkpoint contradicts itself, or an expert has rank 0.
    """
    checkpoint.validate()
    config = checkpoint.config
    for name, rank in zip(config.expert_names, config.ranks, strict=True):
        if rank == 0:
            raise ValueError(f"expert {name!r} has rank 0: PEFT has no adapter without ranks")
    folders = {name: Path(folder) / name for name in config.expert_names}
    for e, own in enumerate(folders.values()):
        adapter = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": config.base_model,
            "inference_mode": True,
            "r": config.ranks[e],
            "lora_alpha": config.lora_alpha[e],
            "use_rslora": config.rslora,
            "lora_dropout": 0.0,
            "bias": "none",
            # full names: a last component would also meet the layers that are not routed
            "target_modules": checkpoint.modules,
        }
        tensors = {}
        for module in checkpoint.modules:
            stacked, rank = checkpoint.module_tensors(module), config.ranks[e]
            tensors[f"{PREFIX}{module}.lora_A.weight"] = stacked["lora_A"][e, :rank]
            tensors[f"{PREFIX}{module}.lora_B.weight"] = stacked["lora_B"][e, :, :rank]
        write_folder(own, {ADAPTER_TENSORS: tensors, ADAPTER_CONFIG: adapter})
    return folders


def _read_adapter(folder: Path) -> _Adapter:
    """One PEFT folder, checked."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder} has no {ADAPTER_CONFIG}: take a folder that PEFT saved")
    values = read_json(folder / ADAPTER_CONFIG)
    _refuse_more_than_lora(folder, values)
    lora: dict[str, dict[str, Tensor]] = {"lora_A": {}, "lora_B": {}}
    for key, tensor in _adapter_tensors(folder).items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise ValueError(
                f"{folder} has {short(key)}: only lora_A.weight and lora_B.weight can be converted"
            )
        module, kind = found.groups()
        if module in lora[kind]:
            raise ValueError(
                f"{folder} has {kind} of {short(module)} twice: save one adapter a folder"
            )
        if tensor.ndim != 2:
            raise ValueError(
                f"{folder}: {short(key)} is {short(list(tensor.shape))}: only adapters of "
                "nn.Linear, two-dimensional, can be converted"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{folder}: {short(key)} is {tensor.dtype}: save it as fp32 or bf16")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{folder}: {short(key)} has NaN or Inf: train it again")
        lora[kind][module] = tensor
    if lora["lora_A"].keys() != lora["lora_B"].keys():
        lonely = sorted(lora["lora_A"].keys() ^ lora["lora_B"].keys())
        raise ValueError(f"{folder}: {short(lonely[0])} has only one of lora_A and lora_B")
    if not lora["lora_A"]:
        raise ValueError(f"{folder} has no LoRA tensors: take a trained adapter")
    sizes = _sizes(folder, values, list(lora["lora_A"]))
    for module, (rank, _) in sizes.items():
        shapes = [list(lora[kind][module].shape) for kind in ("lora_A", "lora_B")]
        if [shapes[0][0], shapes[1][1]] != [rank, rank]:
            raise ValueError(
                f"{folder}: {short(module)} has lora_A {short(shapes[0])} and lora_B "
                f"{short(shapes[1])}, but {ADAPTER_CONFIG} gives it rank {rank}"
            )
    return _Adapter(
        base_model=values.get("base_model_name_or_path") or "",
        rslora=values.get("use_rslora", False),
        lora_A=lora["lora_A"],
        lora_B=lora["lora_B"],
        sizes=sizes,
    )


def _refuse_more_than_lora(folder: Path, values: Mapping[str, Any]) -> None:
    """Refuse every setting that makes the adapter more than scaling * B A."""
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder} has peft_type={short(kind)}: only LORA can be converted")
    for name, remedy in REFUSED.items():
        if values.get(name):
            raise ValueError(f"{folder} has {name}={short(values[name])}: {remedy}")
    if values.get("bias", "none") != "none":
        raise ValueError(
            f"{folder} has bias={short(values['bias'])}: MoGU experts have no bias; train with "
            'bias="none"'
        )
    init = values.get("init_lora_weights", True)
    if not any(init is plain or (init == plain and isinstance(init, str)) for plain in PLAIN_INITS):
        raise ValueError(
            f"{folder} has init_lora_weights={short(init)}: that changes the base and the adapter "
            "fits only that base; save it again with path_initial_model_for_weight_conversion"
        )
    for name, kinds in {"base_model_name_or_path": (str, type(None)), "use_rslora": bool}.items():
        if name in values and not isinstance(values[name], kinds):
            raise TypeError(f"{folder} has {name}={short(values[name])}: take what PEFT writes")


def _adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The safetensors of a PEFT folder, in one file or in shards."""
    if (folder / ADAPTER_TENSORS).is_file():
        return read_tensors(folder / ADAPTER_TENSORS)
    if not (folder / ADAPTER_INDEX).is_file():
        remedy = "take a folder that PEFT saved"
        if (folder / ADAPTER_PICKLE).is_file():
            remedy = (
                f"{ADAPTER_PICKLE} is a pickle and never read; load it with PEFT where you trust "
                "it, and save it with safe_serialization=True"
            )
        raise ValueError(f"{folder} has no {ADAPTER_TENSORS}: {remedy}")
    shards = read_json(folder / ADAPTER_INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{folder / ADAPTER_INDEX} has no weight_map: take what PEFT writes")
    tensors = {}
    for name in sorted(set(map(str, shards.values()))):
        if not _SHARD.fullmatch(name) or not (folder / name).is_file():
            raise ValueError(
                f"{folder / ADAPTER_INDEX} names {short(name)}, which is no shard here"
            )
        tensors |= read_tensors(folder / name)
    if tensors.keys() != shards.keys():
        differing = sorted(tensors.keys() ^ shards.keys())
        raise ValueError(
            f"{folder}: {short(differing[0])} is not both in a shard and in {ADAPTER_INDEX}: copy "
            "the folder again"
        )
    return tensors


def _sizes(
    folder: Path, values: Mapping[str, Any], modules: list[str]
) -> dict[str, tuple[int, float]]:
    """(rank, lora_alpha) of each module, as PEFT looks them up."""
    patterns = {}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns[name] = values.get(name) or {}
        if not isinstance(patterns[name], dict):
            raise TypeError(f"{folder} has {name}={short(patterns[name])}: take what PEFT writes")
        for pattern in patterns[name]:
            _check_pattern(folder, name, pattern)
    sizes = {}
    for module in modules:
        rank = _looked_up(patterns["rank_pattern"], module, values.get("r"))
        alpha = _looked_up(patterns["alpha_pattern"], module, values.get("lora_alpha"))
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank < 2**31:
            raise ValueError(f"{folder} has r={short(rank)} for {short(module)}: take at least 1")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e30:
            raise ValueError(
                f"{folder} has lora_alpha={short(alpha)} for {short(module)}: take a finite number "
                "above 0, or leave the module out"
            )
        sizes[module] = (rank, float(alpha))
    return sizes


def _check_pattern(folder: Path, name: str, pattern: str) -> None:
    """A regular expression from a file must not take exponential time."""
    try:
        re.compile(pattern)
        plain = len(re.findall(r"[*+?{]", pattern)) <= 3 and not re.search(r"\)[*+?{]", pattern)
    except (re.error, RecursionError, OverflowError):
        plain = False
    if not plain or len(pattern) > 200:
        raise ValueError(
            f"{folder} has {short(pattern)} in {name}: take module names, or patterns with at most "
            "three repeats and no repeated group"
        )


def _looked_up(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that matches the end of the module's name."""
    if not pattern:
        return default
    from peft.utils.other import get_pattern_key  # slow to import, and seldom needed

    return pattern.get(get_pattern_key(list(pattern), module), default)


def _stacked(
    adapters: Mapping[str, _Adapter],
    routers: Mapping[str, Mapping[str, Tensor]] | None,
    *,
    architecture: str,
    base_model: str | None,
    gate: str,
    routed_tokens: int | None,
    provenance: dict[str, Any],
) -> MoGUCheckpoint:
    """One checkpoint of all experts, checked."""
    if not adapters:
        raise ValueError("experts={}: take at least one PEFT folder")
    modules = list(dict.fromkeys(m for adapter in adapters.values() for m in adapter.lora_A))
    ranks = [max(rank for rank, _ in adapter.sizes.values()) for adapter in adapters.values()]
    rslora = all(adapter.rslora for adapter in adapters.values())
    lora_alpha = [
        _expert_alpha(adapter, rank, rslora)
        for adapter, rank in zip(adapters.values(), ranks, strict=True)
    ]
    if routers is None:
        routers = _neutral_routers(adapters, modules)
    if routers.keys() != set(modules):
        differing = sorted(routers.keys() ^ set(modules))
        raise ValueError(
            f"{short(differing[0])} has not both LoRA tensors and a router: give `routers` for "
            "exactly the modules of the adapters"
        )
    mlp = {m: own["router.linear_0.weight"] for m, own in routers.items() if _is_mlp(own)}
    config = MoGUConfig(
        base_model=base_model or _base_model(adapters),
        architecture=architecture,
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in modules})),
        ranks=tuple(ranks),
        lora_alpha=tuple(lora_alpha),
        gate=gate,
        router="mlp" if mlp else "linear",
        router_hidden=next(iter(mlp.values())).shape[1] if mlp else 512,
        routed_tokens=routed_tokens,
        expert_names=tuple(adapters),
        rslora=rslora,
        provenance=provenance,
    )
    tensors = {}
    for module in modules:
        own = _stacked_experts(adapters, module, config) | dict(routers[module])
        tensors |= {f"{module}.{key}": tensor for key, tensor in own.items()}
    checkpoint = MoGUCheckpoint(config, tensors)
    checkpoint.validate()
    return checkpoint


def _expert_alpha(adapter: _Adapter, rank: int, rslora: bool) -> float:
    """The lora_alpha that gives the expert, at `rank`, the scaling of most of its modules."""
    counts = Counter(adapter.sizes.values())
    own_rank, alpha = counts.most_common(1)[0][0]
    if own_rank == rank and adapter.rslora == rslora:
        return alpha  # as it was, without a rounding
    scaling = alpha / (own_rank**0.5 if adapter.rslora else own_rank)
    return scaling * (rank**0.5 if rslora else rank)


def _stacked_experts(
    adapters: Mapping[str, _Adapter], module: str, config: MoGUConfig
) -> dict[str, Tensor]:
    """`lora_A` [E, rank, in] and `lora_B` [E, out, rank] of one module, padded with zeros."""
    having = {name: adapter for name, adapter in adapters.items() if module in adapter.lora_A}
    shapes = {
        name: [adapter.lora_B[module].shape[0], adapter.lora_A[module].shape[1]]
        for name, adapter in having.items()
    }
    N, K = next(iter(shapes.values()))
    for name, shape in shapes.items():
        if shape != [N, K]:
            raise ValueError(
                f"{short(module)} is for a weight of {shape} in {short(name)} but of {[N, K]} in "
                f"{short(next(iter(shapes)))}: take adapters of one base model"
            )
    parts, dtypes = {}, []
    for e, name in enumerate(adapters):
        if name not in having:
            continue
        lora_A, lora_B = having[name].lora_A[module], having[name].lora_B[module]
        quotient = having[name].scaling(module) / config.scaling[e]
        # a scaling that went through lora_alpha may come back one rounding off
        if not math.isclose(quotient, 1, rel_tol=1e-12):
            lora_B = lora_B.to(torch.promote_types(lora_B.dtype, torch.float32)) * quotient
        parts[e] = (lora_A, lora_B)
        dtypes += [lora_A.dtype, lora_B.dtype]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    stacked_A = torch.zeros(config.num_experts, config.rank, K, dtype=dtype)
    stacked_B = torch.zeros(config.num_experts, N, config.rank, dtype=dtype)
    for e, (lora_A, lora_B) in parts.items():
        stacked_A[e, : len(lora_A)] = lora_A
        stacked_B[e, :, : len(lora_A)] = lora_B
    return {"lora_A": stacked_A, "lora_B": stacked_B}


def _neutral_routers(
    adapters: Mapping[str, _Adapter], modules: list[str]
) -> dict[str, dict[str, Tensor]]:
    """A "linear" router of zeros for every module."""
    E, routers = len(adapters), {}
    for module in modules:
        K = next(a.lora_A[module].shape[1] for a in adapters.values() if module in a.lora_A)
        routers[module] = {"gate_weight": torch.zeros(E, K), "gate_bias": torch.zeros(E)}
    return routers


def _is_mlp(router: Mapping[str, Tensor]) -> bool:
    first = router.get("router.linear_0.weight")
    return first is not None and first.ndim == 3


def _base_model(adapters: Mapping[str, _Adapter]) -> str:
    """The base model that all folders name."""
    names = {adapter.base_model for adapter in adapters.values()} - {""}
    if len(names) > 1:
        raise ValueError(
            f"the folders name different base models, {short(tuple(sorted(names)))}: pass "
            "base_model= if they are the same"
        )
    return next(iter(names), "unnamed")


def _one_module_a_layer(adapters: Mapping[str, _Adapter]) -> dict[int, str]:
    """The routed module of each layer, by the number in its name."""
    modules: dict[int, str] = {}
    for module in dict.fromkeys(m for adapter in adapters.values() for m in adapter.lora_A):
        numbers = re.findall(r"(?<![^.])\d{1,4}(?![^.])", module)
        if len(numbers) != 1:
            raise ValueError(
                f"{short(module)} has {len(numbers)} layer numbers: the published files route one "
                "module in each numbered layer"
            )
        layer = int(numbers[0])
        if layer in modules:
            raise ValueError(
                f"layer {layer} has {short(modules[layer])} and {short(module)}: the published "
                "files route one module a layer; use from_peft"
            )
        modules[layer] = module
    return modules


def _official_routers(
    layers: Mapping[int, Mapping[str, Tensor]], modules: Mapping[int, str], path: Path
) -> dict[str, dict[str, Tensor]]:
    """The routers by module name, stacked in the order of `OFFICIAL_ROUTERS`."""
    if lonely := sorted(layers.keys() - modules.keys()):
        raise ValueError(f"{path} has a router for layer {lonely[0]}, but no adapter is there")
    if lonely := sorted(modules.keys() - layers.keys()):
        raise ValueError(f"{path} has no router for layer {lonely[0]}, where an adapter is")
    routers = {}
    for layer, tensors in layers.items():
        own = {}
        for key in ROUTER_TENSORS:
            both = [tensors[f"{prefix}.{key}"] for prefix in OFFICIAL_ROUTERS.values()]
            if both[0].shape != both[1].shape:
                raise ValueError(
                    f"{path}: layer {layer} has {key} of {short(list(both[1].shape))} in alpha_ "
                    f"but of {short(list(both[0].shape))} in beta_"
                )
            own[f"router.{key}"] = torch.stack(both)
        routers[modules[layer]] = own
    return routers


def _read_router(path: Path) -> tuple[str, dict[int, dict[str, Tensor]]]:
    """The family ("model" or "transformer") and the tensors by layer of a published router."""
    families, layers = set(), {}
    for key, tensor in _read_pickled_tensors(path).items():
        found = _ROUTER_KEY.fullmatch(key)
        if found is None or found[4] not in ROUTER_TENSORS:
            raise ValueError(
                f"{path} has {short(key)}: take a published router, with keys such as "
                "model.routers.0.alpha_.linear_0.weight"
            )
        families.add(found[1])
        layers.setdefault(int(found[2]), {})[f"{found[3]}.{found[4]}"] = tensor
    if len(families) != 1:
        raise ValueError(
            f"{path} has keys of {len(families)} model families: take a published router of one"
        )
    wanted = {f"{prefix}.{key}" for prefix in OFFICIAL_ROUTERS.values() for key in ROUTER_TENSORS}
    for layer, tensors in layers.items():
        if missing := sorted(wanted - tensors.keys()):
            raise ValueError(f"{path} has no {missing[0]} for layer {layer}: copy it again")
    return families.pop(), layers


def _read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """A flat dict of tensors that `torch.save` wrote; whatever else it holds is refused unread."""
    if not path.is_file():
        raise ValueError(f"{path} is no file: take router_layer/N_router.pth")
    remedy = "take a state dict that torch.save wrote, or save it again with a current torch"
    try:
        named = _pickled_names(path)
    except Exception as error:  # zipfile and pickletools fail in many ways on a damaged file
        raise ValueError(
            f"{path} is damaged or no router ({short(str(error))}): {remedy}"
        ) from error
    if foreign := sorted(named - _GLOBALS):
        raise ValueError(
            f"{path} holds {short(foreign[0])} in its pickle: only a flat dict of tensors is read"
        )
    try:
        # mapped: the published files have about 1 GB, and stacking copies them once
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # so does torch
        raise ValueError(f"{path} cannot be read ({short(str(error))}): {remedy}") from error
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{path} holds {type(values).__name__}, not a dict of tensors: {remedy}")
    for key, tensor in values.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path} holds {short(key)} of type {type(tensor).__name__}: only a flat dict of "
                "tensors is read"
            )
        # a tensor with strides of 0 may claim any size
        if not tensor.is_contiguous() or tensor.dtype not in DTYPES:
            raise ValueError(
                f"{path}: {short(key)} is {tensor.dtype} with strides {short(tensor.stride())}: "
                "save contiguous fp32, bf16 or fp16 tensors"
            )
    return {key: tensor.detach() for key, tensor in values.items()}


def _pickled_names(path: Path) -> set[str]:
    """Every global that the pickle inside a `torch.save`d file names; nothing is run.

    `weights_only=True` runs no foreign code, but it lets a pickle ask for memory ("bytearray"), and
    a compressed zip may grow by a factor of a thousand.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) != len(names):
            raise ValueError("an entry stands there twice")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed, which torch.save never does")
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE_BYTES:
            raise ValueError("not one small data.pkl")
        data = archive.read(pickles[0])
    named = set()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL":
            named.add(str(argument))
        elif opcode.name in _HIDDEN_GLOBALS:
            named.add(opcode.name)
    return named
