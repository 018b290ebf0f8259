"""Swapping projections of a Hugging Face model for routed ones, and back."""

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mogu_kernels.architectures import ARCHITECTURES, Architecture, is_target
from mogu_kernels.checkpoint import (
    CONFIG_FILE,
    TENSORS_FILE,
    MoGUCheckpoint,
    MoGUConfig,
    load_checkpoint,
)
from mogu_kernels.modules import MoGUGatedMLP, MoGULinear, SharedInput, has_plain_weight
from mogu_kernels.state import RoutingState, routed_modules

# what a gated MLP's act_fn may be, by its name in the model's config
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}

# what cannot be routed though it looks like a linear, and what to do
REFUSED = {
    "Conv1D": "it keeps its weight transposed: replace it by an nn.Linear first",
    "NormHead": "it changes its own weight",
}


@dataclasses.dataclass(frozen=True)
class AttachReport:
    """What `attach` changed.

    Attributes:
        modules: names of the swapped projections.
        fused_mlps: names of the gated MLPs whose gate_proj and up_proj became one GEMM kernel.
        parameters_before: of the model.
        parameters_added: experts and folded routers.
    """

    modules: tuple[str, ...]
    fused_mlps: tuple[str, ...]
    parameters_before: int
    parameters_added: int

    def __str__(self):
        """One line."""
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in self.modules}))
        share = 100 * self.parameters_added / self.parameters_before
        return (
            f"routed {len(self.modules)} projections ({kinds}): "
            f"+{self.parameters_added:,} parameters ({share:.2f} %)"
        )


def target_linears(
    model: nn.Module, target_modules: Sequence[str], layers: Sequence[int] | None = None
) -> dict[str, nn.Linear]:
    """The linears of `model` that are targets, by full name.

    Args:
        model: of any architecture; one of the table takes only the projections of its row.
        target_modules: ends of names, such as ("o_proj",), or patterns for whole names, such as
            ("model.layers.*.mixer.out_proj",).
        layers: keep only modules with one of these layer numbers in their name; None keeps all.

    Raises:
        ValueError: a target that the architecture's row does not have, the output embedding, or
            nothing is left.
        TypeError: a target that is not an `nn.Linear`.
    """
    row = ARCHITECTURES.get(_architecture(model))
    for target in target_modules:
        if row is None:
            break
        if target.rpartition(".")[2] not in row.projections:
            raise ValueError(
                f"{target!r} is no projection of {_architecture(model)}: take any of "
                f"{', '.join(row.projections)}"
            )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = {}
    for name, module in model.named_modules():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if not is_target(name, target_modules):
            continue
        if layers is not None and not set(numbers) & set(layers):
            continue
        if module is head:
            raise ValueError(f"{name} is the output embedding, often tied: it cannot be routed")
        kind = type(module).__name__
        if not isinstance(module, nn.Linear) or kind in REFUSED:
            remedy = REFUSED.get(kind, "only nn.Linear can be routed")
            raise TypeError(f"{name} is a {kind}: {remedy}")
        found[name] = module
    if not found:
        linears = {
            n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)
        }
        raise ValueError(
            f"no module of {_architecture(model)} is one of {tuple(target_modules)}: its linears "
            f"are {', '.join(sorted(linears))}"
        )
    return found


def attach(
    model: nn.Module,
    checkpoint: MoGUCheckpoint | str | os.PathLike,
    *,
    trainable: bool = False,
) -> AttachReport:
    """Swap the projections that `checkpoint` names for routed ones, in place.

    Everything is checked before the first swap: after an error the model is as it was. Base weights
    are shared, not copied; `detach` undoes the swap. Projections of one parent that read the same
    hidden states share one shrink, and a gated MLP whose gate_proj and up_proj are both routed is
    computed in one GEMM kernel.

    Args:
        model: a Hugging Face causal language model on its final devices and in its final dtype.
            What it saves while it is attached is the base model.
        checkpoint: a folder, an id on the Hugging Face hub, or what `load_checkpoint` returned.
        trainable: keep published routers unfolded and let experts and routers have gradients.
            Otherwise routers are folded, exactly, and nothing that is added has gradients.

    Returns:
        A report; `print(report)` gives one line.

    Raises:
        ValueError: the checkpoint is damaged or is for another architecture, a module is missing or
            of another shape, or the model is routed already or sharded over several ranks.
        TypeError: a module that cannot be routed.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            raise ValueError(
                f"{name} is sharded over ranks: to a model that transformers' tp_plan has sharded, "
                "mogu_kernels.parallel.attach_parallel attaches; with FSDP attach before sharding"
            )
    return attach_shards(model, checkpoint, trainable=trainable)


def attach_shards(
    model: nn.Module,
    checkpoint: MoGUCheckpoint | str | os.PathLike,
    *,
    trainable: bool = False,
) -> AttachReport:
    """`attach`, where weights may be DTensors; what they are sharded into is up to the caller."""
    if isinstance(checkpoint, str | os.PathLike):
        checkpoint = load_checkpoint(checkpoint_folder(checkpoint))
    checkpoint.validate()
    if not trainable:
        checkpoint = checkpoint.folded(_router_dtype(model))
    config = checkpoint.config
    if any(isinstance(module, MoGULinear) for module in model.modules()):
        raise ValueError("the model is routed already: detach it first")
    linears = fitting_linears(model, checkpoint)

    state, swaps = RoutingState(config.routed_tokens), {}
    before = sum(p.numel() for p in model.parameters())
    for name in checkpoint.modules:
        swaps[name] = _routed(name, linears[name], config, checkpoint, trainable)
        swaps[name].routing = state
    for name, module in swaps.items():
        model.set_submodule(name, module)
    row = ARCHITECTURES.get(config.architecture)
    fused = ()
    if row is not None:
        _share_inputs(swaps, row)
        fused = _fuse_mlps(model, row)
    if hasattr(model, "save_pretrained"):
        vars(model)["save_pretrained"] = functools.partial(_save_base, model)
    after = sum(p.numel() for p in model.parameters())
    return AttachReport(tuple(swaps), fused, before, after - before)


def fitting_linears(model: nn.Module, checkpoint: MoGUCheckpoint) -> dict[str, nn.Linear]:
    """The linears of `model` that `checkpoint` is for, by name; nothing is changed.

    Raises:
        ValueError: the checkpoint is for another architecture, or names a module that is missing or
            of another shape.
        TypeError: a module that cannot be routed.
    """
    config = checkpoint.config
    if config.architecture != _architecture(model):
        raise ValueError(
            f"the checkpoint is for {config.architecture} but the model is {_architecture(model)}"
        )
    linears = target_linears(model, config.target_modules)
    for name in checkpoint.modules:
        if name not in linears:
            raise ValueError(f"the checkpoint routes {name}, which the model does not have")
        tensors, linear = checkpoint.module_tensors(name), linears[name]
        shape = [tensors["lora_B"].shape[1], tensors["lora_A"].shape[2]]
        if [linear.out_features, linear.in_features] != shape:
            raise ValueError(
                f"the checkpoint's {name} is for a weight of {shape} but the model's is "
                f"{[linear.out_features, linear.in_features]}"
            )
    return linears


def detach(model: nn.Module) -> nn.Module:
    """Put the original modules back: the same objects, the same parameters.

    Raises:
        ValueError: the model has no routed projection.
    """
    routed = routed_modules(model)
    for name, module in routed.items():
        if module.base is None:
            raise ValueError(f"{name} was built as a MoGULinear, so there is nothing to restore")
    for name, module in list(model.named_modules()):
        if isinstance(module, MoGUGatedMLP) and module.base is not None:
            model.set_submodule(name, module.base.train(module.training))
    for name, module in routed.items():
        module.synchronise_base()
        model.set_submodule(name, module.base.train(module.training))
    model.__dict__.pop("save_pretrained", None)
    return model


def seeded_checkpoint(
    model: nn.Module,
    target_modules: Sequence[str],
    *,
    ranks: Sequence[int] = (8, 8),
    layers: Sequence[int] | None = None,
    router: str = "mlp",
    router_hidden: int = 512,
    gate: str = "sigmoid",
    expert_names: Sequence[str] = ("glad", "unwill"),
    strength: float = 0.02,
    seed: int = 0,
) -> MoGUCheckpoint:
    """Make a checkpoint of random experts and routers: to start from, or to try things out.

    Args:
        model: the one that it is for.
        target_modules: as in `target_linears`.
        ranks: one per expert; lora_alpha is twice the rank.
        layers: as in `target_linears`.
        router: "mlp" (as published) or "linear".
        router_hidden: width of the "mlp" router.
        gate: "sigmoid" or "softmax".
        expert_names: one per expert.
        strength: standard deviation of `lora_B`; 0 leaves the base's answer up to the gates' total.
        seed: of a generator of its own.

    Raises:
        ValueError: as `target_linears` and `MoGUConfig`.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or "unnamed"
    config = MoGUConfig(
        base_model=Path(name).name if os.path.isabs(name) else name,
        architecture=_architecture(model),
        target_modules=tuple(target_modules),
        ranks=tuple(ranks),
        lora_alpha=tuple(2.0 * rank for rank in ranks),
        gate=gate,
        router=router,
        router_hidden=router_hidden,
        expert_names=tuple(expert_names),
        provenance={"trained": False, "seed": seed},
    )
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std):
        return torch.randn(*shape, generator=generator) * std

    E, H, tensors = config.num_experts, router_hidden, {}
    for name, linear in target_linears(model, target_modules, layers).items():
        N, K = linear.weight.shape
        lora_A = normal(E, config.rank, K, std=K**-0.5)
        lora_B = normal(E, N, config.rank, std=strength)
        for e, rank in enumerate(ranks):
            lora_A[e, rank:], lora_B[e, :, rank:] = 0, 0
        own = {"lora_A": lora_A, "lora_B": lora_B}
        if router == "linear":
            own |= {"gate_weight": normal(E, K, std=K**-0.5), "gate_bias": normal(E, std=0.1)}
        else:
            own |= {
                "router.linear_0.weight": normal(E, H, K, std=K**-0.5),
                "router.linear_1.weight": normal(E, K, H, std=H**-0.5),
                "router.linear_1.bias": normal(E, K, std=0.1),
                "router.linear_2.weight": normal(E, 1, K, std=K**-0.5),
                "router.linear_2.bias": normal(E, 1, std=0.1),
            }
        tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    return MoGUCheckpoint(config, tensors)


def load_pretrained(name: str) -> tuple[Any, Any]:
    """(model in eval mode on this machine's device, tokenizer) of a folder or a hub id.

    Raises:
        ValueError: a path without a model.
        OSError: an id that the hub does not give.
    """
    path = Path(name)
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if (is_path or path.is_dir()) and not (path / "config.json").is_file():
        raise ValueError(
            f"{name} has no config.json: take a folder that save_pretrained wrote, or a hub id"
        )
    for noisy in ("torchao", "torch.utils._pytree"):  # GPU libraries that a CPU does not have
        logging.getLogger(noisy).setLevel(logging.ERROR)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as bars

    bars.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # a launcher's process has its own
    return model.to(own if torch.cuda.is_available() else "cpu").eval(), tokenizer


def checkpoint_folder(checkpoint: str | os.PathLike) -> str | os.PathLike:
    """A local folder: as it is, or fetched from the hub where it is an id and no folder."""
    name = os.fspath(checkpoint)
    if os.path.exists(name) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return checkpoint
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=[CONFIG_FILE, TENSORS_FILE])
    except Exception as error:  # the hub raises what its transport raises
        raise ValueError(
            f"{name} is no folder here, and the hub does not give it ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]})"
        ) from error


def _save_base(model: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
    """`save_pretrained` of an attached model: the base alone; experts are saved as a checkpoint."""
    if state_dict is None:
        routed = routed_modules(model)
        added = {
            f"{name}.{key}"
            for name, module in routed.items()
            for key in set(module.state_dict()) - set(module.base.state_dict())
        }
        state_dict = {k: tensor for k, tensor in model.state_dict().items() if k not in added}
    type(model).save_pretrained(model, *args, state_dict=state_dict, **kwargs)


def _share_inputs(swaps: dict[str, MoGULinear], row: Architecture) -> None:
    """Let the routed projections of one parent that read the same hidden states shrink together."""
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in swaps):
        for names in row.shared_inputs:
            members = [swaps[f"{parent}.{n}"] for n in names if f"{parent}.{n}" in swaps]
            if SharedInput.can_share(members):
                shared = SharedInput(members)
                for member in members:
                    member.shared_input = shared


def _fuse_mlps(model: nn.Module, row: Architecture) -> tuple[str, ...]:
    """Swap gated MLPs whose gate_proj and up_proj are routed alike; their names."""
    config = getattr(model, "config", None)
    names = (getattr(config, key, None) for key in ("hidden_activation", "hidden_act"))
    activation = ACTIVATIONS.get(next(filter(None, names), ""))
    fused = []
    mlps: dict[str, Any] = dict(model.named_modules())
    for name, mlp in mlps.items():
        if activation is None or type(mlp).__name__ != row.gated_mlp:
            continue
        pair = (mlp.gate_proj, mlp.up_proj)
        if not all(isinstance(module, MoGULinear) for module in pair):
            continue
        if not MoGUGatedMLP.can_fuse(*pair):
            continue
        module = MoGUGatedMLP(*pair, mlp.down_proj, activation, mlp.act_fn)
        object.__setattr__(module, "base", mlp)  # not a child: its parameters are ours
        model.set_submodule(name, module.train(mlp.training))
        fused.append(name)
    return tuple(fused)


def _architecture(model: nn.Module) -> str:
    """The class name, through wrappers that keep a Hugging Face config."""
    names = getattr(getattr(model, "config", None), "architectures", None)
    return names[0] if names else type(model).__name__


def _router_dtype(model: nn.Module) -> torch.dtype:
    """Fp32, or fp64 for a model in fp64."""
    parameter = next(model.parameters(), torch.empty(0))
    return torch.promote_types(parameter.dtype, torch.float32)


def _routed(
    name: str, linear: nn.Linear, config: MoGUConfig, checkpoint: MoGUCheckpoint, trainable: bool
) -> MoGULinear:
    """A routed copy of `linear` with the checkpoint's experts; `linear` is not changed."""
    tensors = checkpoint.module_tensors(name)
    if linear.weight.is_meta:
        raise ValueError(
            f"{name} is on the meta device: load the model before attaching, or, if it is to be "
            "offloaded, attach first and dispatch afterwards"
        )
    module = MoGULinear.from_linear(
        linear,
        config.rank,
        config.num_experts,
        config.gate,
        router=config.router,
        scaling=config.scaling,
        router_hidden=config.router_hidden,
    )
    row = ARCHITECTURES.get(config.architecture)
    if row and type(linear).__name__ in row.plain_linears:
        module.is_fused = has_plain_weight(linear)
    parameters = dict(module.named_parameters())
    for key, tensor in tensors.items():
        parameters[key].requires_grad_(trainable)
        parameters[key].data.copy_(tensor)
    return module
