"""Routed projections over the ranks of a process group: tensor parallelism in plain PyTorch.

    column-parallel   a narrower `MoGULinear` in every rank, no communication
    row-parallel      one all-reduce of y and of the sums that shrink and router take; then gates

Gates are no sums, so that nothing may be gated before the all-reduce.
"""

import os
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from mogu_kernels import ops
from mogu_kernels.checkpoint import MoGUCheckpoint
from mogu_kernels.hf import AttachReport, attach_shards, detach
from mogu_kernels.modules import MoGULinear


def shrink_sums(x: Tensor, lora_A: Tensor, gate_weight: Tensor) -> Tensor:
    """What one shard of in_features contributes to the ranks and to the router's logits.

    Semantics:
        sums = F.linear(x, torch.cat([lora_A.flatten(0, 1), gate_weight]))  # in fp32 or fp64

    Args:
        x: [M, K / ranks].
        lora_A: [E, r, K / ranks].
        gate_weight: [E, K / ranks] fp32 (fp64 beside fp64).

    Returns:
        [M, E * r + E] in fp32, or fp64 for fp64 x: add them up over the shards.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = torch.cat([lora_A.to(wide).flatten(0, 1), gate_weight.to(wide)])
    return F.linear(x.to(wide), rows)


def gate_sums(
    sums: Tensor,
    gate_bias: Tensor,
    *,
    scaling: float | Sequence[float],
    gate: str,
    routed: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of all shards, made into what `ops.gated_expand_` takes.

    Nothing is read from the host, so that a CUDA graph can capture it.

    Semantics:
        ranks, logits = sums[:, :-E].unflatten(1, (E, r)), sums[:, -E:] + gate_bias
        gates = logits.sigmoid()  # or softmax over the experts
        shrunk = (scaling * gates)[..., None] * ranks  # 0 where routed is False
        total = gates.sum(1)  # 1 where routed is False

    Args:
        sums: [M, E * r + E], `shrink_sums` added up over all shards.
        gate_bias: [E].
        scaling: `lora_alpha / rank`, one number for all experts or one each.
        gate: "sigmoid" or "softmax".
        routed: bool [M], or None for all.
        dtype: of shrunk, the one of the projection.

    Returns:
        shrunk [M, E * r] in `dtype`, total [M] and gates [M, E] in fp32 (fp64 for fp64).
    """
    E, wide = len(gate_bias), torch.promote_types(dtype, torch.float32)
    ranks, logits = sums.to(wide).split([sums.shape[1] - E, E], dim=1)
    logits = logits + gate_bias.to(wide)
    gates = logits.sigmoid() if gate == "sigmoid" else logits.softmax(-1)
    total = gates.sum(1)
    factors = zip(ops.checks.scaling_per_expert(scaling, E), gates.split(1, dim=1), strict=True)
    each = zip(factors, ranks.chunk(E, dim=1), strict=True)
    shrunk = torch.cat([scale * own * h for (scale, own), h in each], dim=1)
    if routed is not None:
        total = torch.where(routed, total, 1.0)
        shrunk = torch.where(routed[:, None], shrunk, 0.0)
    return shrunk.to(dtype), total, gates


class ParallelLinear(MoGULinear):
    """A `MoGULinear` of which every rank of a process group holds a part, as plain tensors.

    `parallelize_module` with `RoutedRowwise` or `RoutedColwise` makes one of a `MoGULinear`, in
    place; `attach_parallel` does that for a model that transformers has sharded. `base` is the
    linear in PyTorch's or transformers' sharded form, whose weight this module shares: `detach`
    leaves a sharded model, and what is saved are the base's DTensors, which are whole.

    Inference only: a backward pass is refused.
    """

    sharded: ClassVar[dict[str, int]]  # parameters of which a rank holds a part, and along what
    mesh: DeviceMesh

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., in_features of this rank] -> [..., out_features of this rank]."""
        self._refuse_gradients(hidden_states)
        return super().forward(hidden_states)

    def router_operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `MoGULinear`; `MoGUGatedMLP` comes here without our `forward`."""
        self._refuse_gradients(x)
        return super().router_operands(x)

    def synchronise_base(self) -> None:
        """The base keeps its own DTensors."""

    def _apply(self, fn, recurse=True):
        """`.to()`, `.half()` and kin: the base follows, and stays the owner of the weight."""
        self.base._apply(fn, recurse)
        super()._apply(fn, recurse)
        for name, part in _local_parts(self.base).items():
            self._parameters[name] = nn.Parameter(part, requires_grad=False)
        return self

    def extra_repr(self) -> str:
        """`MoGULinear`'s, of this rank's part, and the number of ranks."""
        return f"{super().extra_repr()}, ranks={self.mesh.size()}"

    def _refuse_gradients(self, x: Tensor) -> None:
        if ops.needs_grad(x, *self._parameters.values()):
            raise ValueError(
                f"{type(self).__name__} has no backward pass: call the model under torch.no_grad() "
                "or torch.inference_mode(), and train in one process"
            )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.base.state_dict(keep_vars=keep_vars).items():
            destination[prefix + name] = tensor


class ColumnParallelLinear(ParallelLinear):
    """Every rank has some of out_features, and the whole router: no communication."""

    sharded: ClassVar[dict[str, int]] = {"weight": 0, "bias": 0, "lora_B": 1}


class RowParallelLinear(ParallelLinear):
    """Every rank has some of in_features: one all-reduce of N + E * r + E columns, then the gates.

    Semantics:
        y, sums = all_reduce(F.linear(x, weight)), all_reduce(shrink_sums(x, lora_A, gate_weight))
        shrunk, total, gates = gate_sums(sums, gate_bias, ...)
        y = ops.gated_expand_(y, shrunk, total, lora_B, bias)

    where both reductions are one collective, in y's dtype.
    """

    sharded: ClassVar[dict[str, int]] = {"weight": 1, "lora_A": 2, "gate_weight": 1}

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., in_features of this rank] -> [..., out_features], the same on every rank."""
        self._refuse_gradients(hidden_states)
        if hidden_states.shape[-1] != self.in_features:
            raise ValueError(
                f"hidden_states has {hidden_states.shape[-1]} features, but this rank holds "
                f"in_features={self.in_features}: shard what comes before, by columns"
            )
        x = hidden_states.reshape(-1, self.in_features)
        y = F.linear(x, self.weight)
        bias = None if self.bias is None else self.bias.to(y.dtype)
        if not self.routing.enabled:
            (y,) = self._add_up(y)
            y = y if bias is None else y + bias
        else:
            y, sums = self._add_up(y, shrink_sums(x, self.lora_A, self.gate_weight))
            shrunk, total, gates = gate_sums(
                sums,
                self.gate_bias,
                scaling=self.scaling,
                gate=self.gate,
                routed=self.routing.tokens(hidden_states),
                dtype=y.dtype,
            )
            y = ops.gated_expand_(y, shrunk, total, self.lora_B.to(y.dtype), bias)
            self.routing.record(self._log_name, gates, hidden_states)
        return y.view(*hidden_states.shape[:-1], self.out_features)

    def _add_up(self, *parts: Tensor) -> list[Tensor]:
        """The sum over all ranks of every tensor, in the first one's dtype, in one collective."""
        flat = torch.cat([part.to(parts[0].dtype).flatten() for part in parts])
        dist.all_reduce(flat, group=self.mesh.get_group())
        pieces = flat.split([part.numel() for part in parts])
        return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]


class RoutedColwise(ParallelStyle):
    """`ColwiseParallel` for a `MoGULinear`: whole hidden states in, this rank's out_features out.

    Raises:
        TypeError: a module that is no `MoGULinear`.
        ValueError: one that cannot be sharded so.
    """

    kind: type[ParallelLinear] = ColumnParallelLinear

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        name = type(self).__name__
        if not isinstance(module, MoGULinear):
            raise TypeError(
                f"{name} takes a MoGULinear, not a {type(module).__name__}: attach a checkpoint "
                "first, and give other linears the styles of torch.distributed"
            )
        if not module.is_fused:
            raise ValueError(
                f"{name} cannot shard the base of this projection, a {type(module.base).__name__}: "
                "take an nn.Linear with a plain weight"
            )
        _check(module, self.kind, device_mesh)
        base = module.base
        if base is None:  # a module that was built, not attached
            base = nn.Linear(module.in_features, module.out_features, False, device="meta")
            base.weight, base.bias = module.weight, module.bias
            object.__setattr__(module, "base", base)
        style = ColwiseParallel() if self.kind is ColumnParallelLinear else RowwiseParallel()
        parallelize_module(base, device_mesh, style, src_data_rank=self.src_data_rank)
        return _take_shards(module, self.kind, device_mesh, self.src_data_rank)


class RoutedRowwise(RoutedColwise):
    """`RowwiseParallel` for a `MoGULinear`: this rank's in_features in, out_features out.

    Raises:
        TypeError: a module that is no `MoGULinear`.
        ValueError: one that cannot be sharded so.
    """

    kind: type[ParallelLinear] = RowParallelLinear


# transformers' names of what its plan may do with a projection that is to be routed
_PLAN = {"colwise": ColumnParallelLinear, "rowwise": RowParallelLinear}


def attach_parallel(
    model: nn.Module, checkpoint: MoGUCheckpoint | str | os.PathLike
) -> AttachReport:
    """`attach` for a model that transformers has sharded by its tensor-parallel plan.

    Args:
        model: loaded with `distributed_config=DistributedConfig(tp_plan="auto")`, on every rank.
        checkpoint: as for `attach`; every rank reads it.

    Returns:
        `attach`'s report. After an error the model is as it was.

    Raises:
        ValueError: as `attach`; or a projection is sharded in another way.
        TypeError: as `attach`.
    """
    report = attach_shards(model, checkpoint)
    plan: Any = getattr(model, "tp_plan", None) or {}
    kinds: dict[Any, type[ParallelLinear]] = {}
    try:
        for name in report.modules:
            module: Any = model.get_submodule(name)
            if not isinstance(module.weight, DTensor):
                continue  # the plan leaves it whole
            style = plan.get(re.sub(r"\.\d+(?=\.)", ".*", name))
            if style not in _PLAN or not module.weight.is_floating_point():
                raise ValueError(
                    f"{name} is sharded as {style!r} in {module.weight.dtype}: only "
                    f"{' and '.join(_PLAN)}, not quantised, can be routed"
                )
            kinds[module] = _PLAN[style]
            _check(module, kinds[module], module.weight.device_mesh)
    except ValueError:
        detach(model)
        raise
    for module, kind in kinds.items():
        _take_shards(module, kind, module.weight.device_mesh, None)
    return report


def _check(module: MoGULinear, kind: type[ParallelLinear], mesh: DeviceMesh) -> None:
    """Whether every rank can have an equal part of `module`."""
    if isinstance(module, ParallelLinear):
        raise ValueError(f"this projection is sharded over {module.mesh.size()} ranks already")
    if module.router is not None:
        raise ValueError("the router is not folded: call module.fold_() before sharding")
    along = kind.sharded["weight"]
    features = module.weight.shape[along]
    if features % mesh.size():
        raise ValueError(
            f"{('out', 'in')[along]}_features={features} is no multiple of {mesh.size()} ranks: "
            "take a number of ranks that divides it"
        )
    if kind is RowParallelLinear and module.shared_input is not None:
        raise ValueError(
            "this projection reads the same hidden states as others, which a row-parallel one "
            "cannot: take RoutedColwise"
        )


def _take_shards(
    module: MoGULinear, kind: type[ParallelLinear], mesh: DeviceMesh, src_data_rank: int | None
) -> nn.Module:
    """Make `module` this rank's part, in place; its base is sharded already."""
    parts = _local_parts(module.base)
    for name in ("lora_A", "lora_B", "gate_weight", "gate_bias"):
        placement = Shard(kind.sharded[name]) if name in kind.sharded else Replicate()
        whole = getattr(module, name).detach()
        part = distribute_tensor(whole, mesh, [placement], src_data_rank=src_data_rank).to_local()
        if name == "lora_B":  # lies in memory as [N, E * r]
            part = part.transpose(0, 1).contiguous().transpose(0, 1)
        parts[name] = part
    for name, part in parts.items():
        module._parameters[name] = nn.Parameter(part, requires_grad=False)
    sharded: Any = module
    sharded.__class__, sharded.mesh, sharded.is_fused = kind, mesh, True
    sharded.in_features, sharded.out_features = sharded.weight.shape[1], sharded.weight.shape[0]
    return sharded


def _local_parts(base: nn.Module) -> dict[str, Tensor]:
    """This rank's weight and, where there is one, bias of a sharded linear: views of its own."""
    return {
        name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        for name, tensor in base.named_parameters()
    }
