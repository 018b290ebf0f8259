"""vLLM's parallel linears, with the routed projections that the checkpoint has for them.

vLLM makes one of these classes wherever a model asks for the linear that it stands for (out-of-tree
layers). One whose name the checkpoint does not know is what it stands for. Any base, quantised or
not, computes its own product; shrink, gates and expand go around it.

Column-parallel: of lora_B a rank has the rows that it has of the base; nothing travels.
Row-parallel: a rank's share of y, of the experts' ranks and of the routers' logits travel together
in one all-reduce, and the gates are applied after it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.utils.torch_utils import direct_register_custom_op

from mogu_kernels import ops
from mogu_kernels.parallel import gate_sums, shrink_sums
from mogu_kernels.router import split_gate_weight
from mogu_kernels.vllm_plugin.batch import CONTEXT_KEY, Tokens
from mogu_kernels.vllm_plugin.settings import Settings

# what vLLM merges, by the names of the parts in the checkpoint
MERGED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


class Projection(nn.Module):
    """One routed projection of the checkpoint, or this rank's shard of it.

    Args:
        name: in the checkpoint.
        settings: with the checkpoint.
        inputs: this rank's columns of the base's weight.
        outputs: its rows.
        dtype: of the base.
        device: of the base.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        inputs: slice,
        outputs: slice,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        checkpoint = settings.load()
        tensors, config = checkpoint.module_tensors(name), checkpoint.config
        self.name, self.gate, self.scaling = name, config.gate, list(config.scaling)
        lora_B = tensors["lora_B"][:, outputs].permute(1, 0, 2).contiguous().permute(1, 0, 2)
        own = {
            "lora_A": tensors["lora_A"][:, :, inputs].to(dtype),
            "lora_B": lora_B.to(dtype),
            "gate_weight": tensors["gate_weight"][:, inputs],
            "gate_bias": tensors["gate_bias"],
        }
        if device.type != "cpu" and dtype != torch.float32:  # what half-precision dots read
            own["gate_weight"] = split_gate_weight(own["gate_weight"], dtype)
        for key, tensor in own.items():  # no parameters: vLLM would look for them in the model
            self.register_buffer(key, tensor.to(device), persistent=False)

    def route_(self, y: Tensor, x: Tensor, tokens: Tokens) -> None:
        """Weigh the base's y [M, N] and add the experts, in place."""
        mask = tokens.mask[: len(x)]
        shrunk, total, gates = ops.shrink_gate(
            x,
            self.lora_A,
            self.gate_weight,
            self.gate_bias,
            scaling=self.scaling,
            gate=self.gate,
            routed=mask,
            return_gates=True,
        )
        ops.gated_expand_(y, shrunk, total, self.lora_B)
        self.count(gates, tokens)

    def route_sums_(self, y: Tensor, sums: Tensor, tokens: Tokens) -> None:
        """Likewise, from `shrink_sums` that have been added up over the ranks."""
        shrunk, total, gates = gate_sums(
            sums,
            self.gate_bias,
            scaling=self.scaling,
            gate=self.gate,
            routed=tokens.mask[: len(sums)],
            dtype=y.dtype,
        )
        ops.gated_expand_(y, shrunk, total, self.lora_B)
        self.count(gates, tokens)

    def count(self, gates: Tensor, tokens: Tokens) -> None:
        """Note the gates for the metrics."""
        if tokens.counts is not None:
            M = len(gates)
            own = tokens.mask[:M], tokens.rows[:M], tokens.answering[:M]
            tokens.counts.add(self.name, gates, *own)


class _Routed:
    """Mixed into vLLM's linears.

    Attributes:
        parts: (projection, its columns of y), one for each that the checkpoint has.
        is_first: of the routed layers of the model, in the order in which they run.
    """

    parts: list[tuple[Projection, slice]]

    def __init__(self: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.parts, self.is_first = [], False
        config = get_current_vllm_config_or_none()
        settings = Settings.of(config) if config is not None else None
        if settings is None:
            return
        parent, _, last = self.prefix.rpartition(".")
        names = [f"{parent}.{part}" for part in MERGED.get(last, (last,))]
        device = torch.get_default_device()  # a weight may be on meta until it is quantised
        tokens = Tokens.of(config, device)
        if not tokens.missing.intersection(names):
            return
        shards = self.shards()
        if len(names) != len(shards) or (self.has_bias and self.skip_bias_add) or self.gathers():
            raise ValueError(
                f"the checkpoint routes {self.prefix}, which vLLM computes in a way that cannot be "
                f"routed ({type(self).__bases__[1].__name__}): take a checkpoint without it"
            )
        stop = 0
        for name, (inputs, outputs) in zip(names, shards, strict=True):
            start, stop = stop, stop + outputs.stop - outputs.start
            if name in tokens.missing:
                part = Projection(name, settings, inputs, outputs, self.params_dtype, device)
                self.add_module(f"mogu_{name.rpartition('.')[2]}", part)
                self.parts.append((part, slice(start, stop)))
        self.is_first = tokens.add(self.prefix, self, [part.name for part, _ in self.parts])
        self.register_buffer("mogu_mask", tokens.mask, persistent=False)

    def base(self: Any, x: Tensor) -> Tensor:
        """The base's y for x; of row-parallel linears this rank's share of it."""
        if self.is_first:
            torch.ops.vllm.mogu_spread(self.mogu_mask)
        whole = isinstance(self, ColumnParallelLinear) or self.tp_rank == 0
        return self.quant_method.apply(self, x, self.bias if whole else None)


class RoutedColumnParallelLinear(_Routed, ColumnParallelLinear):
    """`ColumnParallelLinear`, routed if the checkpoint says so."""

    def shards(self) -> list[tuple[slice, slice]]:
        """This rank's (columns, rows) of each part of the base's weight."""
        return [(slice(None), _shard(self.output_size, self.tp_rank, self.tp_size))]

    def gathers(self) -> bool:
        """Whether the ranks need one another's x or y."""
        return self.gather_output and self.tp_size > 1

    def forward(self, input_: Tensor) -> Any:
        """From x [M, K] to y [M, N / ranks], alone or with None for a bias."""
        if not self.parts:
            return super().forward(input_)
        y = self.base(input_)
        torch.ops.vllm.mogu_route(y, input_, self.mogu_mask, self.prefix)
        return (y, None) if self.return_bias else y


class RoutedMergedColumnParallelLinear(RoutedColumnParallelLinear, MergedColumnParallelLinear):
    """`MergedColumnParallelLinear`, such as gate_up_proj."""

    def shards(self) -> list[tuple[slice, slice]]:
        """See `RoutedColumnParallelLinear`."""
        return [
            (slice(None), _shard(size, self.tp_rank, self.tp_size)) for size in self.output_sizes
        ]


class RoutedQKVParallelLinear(RoutedColumnParallelLinear, QKVParallelLinear):
    """`QKVParallelLinear`; ranks may share the heads of keys and values."""

    def shards(self) -> list[tuple[slice, slice]]:
        """See `RoutedColumnParallelLinear`."""
        replicas = self.num_kv_head_replicas
        query = self.total_num_heads * self.head_size
        shared = self.tp_rank // replicas, self.tp_size // replicas
        outputs = [
            _shard(query, self.tp_rank, self.tp_size),
            _shard(self.total_num_kv_heads * self.head_size, *shared),
            _shard(self.total_num_kv_heads * self.v_head_size, *shared),
        ]
        return [(slice(None), own) for own in outputs]


class RoutedRowParallelLinear(_Routed, RowParallelLinear):
    """`RowParallelLinear`, routed if the checkpoint says so, in one all-reduce.

    Where vLLM adds up y later (`reduce_results=False`), only the sums travel, and the first rank
    alone adds the experts.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not self.reduce_results and self.tp_rank > 0:
            for part, _ in self.parts:
                part.lora_B.zero_()

    def shards(self) -> list[tuple[slice, slice]]:
        """See `RoutedColumnParallelLinear`."""
        inputs = _shard(self.input_size, self.tp_rank, self.tp_size)
        return [(inputs, slice(0, self.output_size))]

    def gathers(self) -> bool:
        """Whether the ranks need one another's x or y."""
        return not self.input_is_parallel and self.tp_size > 1

    def forward(self, input_: Tensor) -> Any:
        """From x [M, K / ranks] to y [M, N], alone or with None for a bias."""
        if not self.parts:
            return super().forward(input_)
        y = self.base(input_)
        if self.tp_size == 1:
            torch.ops.vllm.mogu_route(y, input_, self.mogu_mask, self.prefix)
        else:
            sums = torch.ops.vllm.mogu_shrink(input_, self.prefix)
            if self.reduce_results:
                N, columns = y.shape[1], sums.shape[1]
                both = torch.cat([y, sums.to(y.dtype)], dim=1)
                y, sums = tensor_model_parallel_all_reduce(both).split([N, columns], dim=1)
                y, sums = y.contiguous(), sums.contiguous()
            else:
                sums = tensor_model_parallel_all_reduce(sums)
            torch.ops.vllm.mogu_route_sums(y, sums, self.mogu_mask, self.prefix)
        return (y, None) if self.return_bias else y


def _shard(size: int, rank: int, ranks: int) -> slice:
    """A rank's part of an axis; vLLM has checked that it can be split."""
    own = size // ranks
    return slice(rank * own, (rank + 1) * own)


# The ops are opaque to torch.compile, as vLLM's attention is: what they do depends on the pass.


def _layer(name: str) -> tuple[Any, Tokens]:
    tokens = get_forward_context().no_compile_layers[CONTEXT_KEY]
    return tokens.layers[name], tokens


def _spread(mask: Tensor) -> None:
    get_forward_context().no_compile_layers[CONTEXT_KEY].spread()


def _route(y: Tensor, x: Tensor, mask: Tensor, name: str) -> None:
    layer, tokens = _layer(name)
    if tokens.any:
        for part, columns in layer.parts:
            if len(layer.parts) == 1 and y.shape[1] == columns.stop - columns.start:
                part.route_(y, x, tokens)
            else:  # the kernels want whole rows
                own = y[:, columns].contiguous()
                part.route_(own, x, tokens)
                y[:, columns] = own


def _shrink(x: Tensor, name: str) -> Tensor:
    part = _layer(name)[0].parts[0][0]
    return shrink_sums(x, part.lora_A, part.gate_weight)


def _shrink_fake(x: Tensor, name: str) -> Tensor:
    part = _layer(name)[0].parts[0][0]
    E, r, _ = part.lora_A.shape
    return x.new_empty(len(x), E * r + E, dtype=torch.promote_types(x.dtype, torch.float32))


def _route_sums(y: Tensor, sums: Tensor, mask: Tensor, name: str) -> None:
    layer, tokens = _layer(name)
    if tokens.any:
        layer.parts[0][0].route_sums_(y, sums, tokens)


def register() -> None:
    """Put the layers in the place of vLLM's, and define the ops, once in a process."""
    if hasattr(torch.ops.vllm, "mogu_route"):
        return
    direct_register_custom_op("mogu_spread", _spread, ["mask"], lambda mask: None)
    direct_register_custom_op("mogu_route", _route, ["y"], lambda y, x, mask, name: None)
    direct_register_custom_op("mogu_shrink", _shrink, [], _shrink_fake)
    direct_register_custom_op(
        "mogu_route_sums", _route_sums, ["y"], lambda y, sums, mask, name: None
    )
    for routed in (
        RoutedColumnParallelLinear,
        RoutedMergedColumnParallelLinear,
        RoutedQKVParallelLinear,
        RoutedRowParallelLinear,
    ):
        base = getattr(linear, routed.__name__.removeprefix("Routed"))
        base.register_oot(routed)
