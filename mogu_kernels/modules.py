"""The drop-in modules: `MoGULinear` for a projection, `MoGUGatedMLP` for a gated MLP."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mogu_kernels import ops
from mogu_kernels.router import Router, split_gate_weight
from mogu_kernels.state import RoutingState

_GATE_PARAMETERS = ("gate_weight", "gate_bias")


class MoGULinear(nn.Linear):
    """An `nn.Linear` with E low-rank experts, weighed per token by a router, in fused kernels.

    Semantics:
        gates = torch.sigmoid(hidden_states @ gate_weight.T + gate_bias)  # or softmax
        y = gates.sum(-1, keepdim=True) * F.linear(hidden_states, weight, bias) + sum(
            scaling[e] * gates[..., e : e + 1] * (hidden_states @ lora_A[e].T @ lora_B[e].T)
            for e in range(num_experts)
        )

    A new module routes with gates of 1/2 and zero adapters: with two experts it is its base.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the base has one.
        rank: r, the largest of the experts' ranks (smaller ones are padded with zeros).
        num_experts: E, 1 to 8.
        gate: "sigmoid" (as published) or "softmax" over the experts.
        router: "linear" (one vector per expert) or "mlp" (the published three linears, trained as
            such and folded on every call; `fold_` folds them for good).
        scaling: `lora_alpha / rank`, one number for all experts or one each.
        router_hidden: width of the "mlp" router, 512 as published.
        device: of the parameters.
        dtype: of weight, bias, lora_A and lora_B. The folded router stays in fp32 (fp64 beside
            fp64), whatever the module is cast to.

    Attributes:
        weight: [N, K], bias [N] or None: the base, as in `nn.Linear`.
        lora_A: [E, r, K], lora_B [E, N, r], which lies in memory as [N, E * r].
        gate_weight: [E, K] and gate_bias [E] in fp32, unless `router` holds the unfolded linears.
        base: the module that `from_linear` wrapped, or None.
        is_fused: whether the base GEMM is ours; not around a quantised or foreign base.

    Raises:
        ValueError: an unknown gate or router kind, or hidden states of another width.

    Source: MoGU, arXiv 2405.14488, section 3.2.
    """

    base: Any
    router: Router | None
    gate_weight: nn.Parameter
    gate_bias: nn.Parameter
    _log_name: str = ""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rank: int = 8,
        num_experts: int = 2,
        gate: str = "sigmoid",
        *,
        router: str = "linear",
        scaling: float | Sequence[float] = 2.0,
        router_hidden: int = 512,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """See the class."""
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        object.__setattr__(self, "base", None)
        self.is_fused = True
        self._add_experts(rank, num_experts, gate, router, scaling, router_hidden, self.weight)

    def _add_experts(self, rank, num_experts, gate, router, scaling, router_hidden, like):
        if gate not in ("sigmoid", "softmax"):
            raise ValueError(f'gate={gate!r}: take "sigmoid" or "softmax"')
        if router not in ("linear", "mlp"):
            raise ValueError(f'router={router!r}: take "linear" or "mlp"')
        options = {"device": like.device, "dtype": like.dtype}
        self.rank, self.num_experts, self.gate = rank, num_experts, gate
        self.scaling = ops.checks.scaling_per_expert(scaling, num_experts)
        self.routing = RoutingState()
        self.shared_input: SharedInput | None = None
        # of a frozen router, for half precision on a GPU; made anew when gate_weight is written
        self._split: Tensor | None = None
        self._split_key: tuple | None = None
        lora_A = torch.empty(num_experts, rank, self.in_features, **options)
        lora_B = torch.zeros(self.out_features, num_experts, rank, **options)
        self.lora_A = nn.Parameter(lora_A.uniform_(-1, 1) * self.in_features**-0.5)
        self.lora_B = nn.Parameter(lora_B.permute(1, 0, 2))
        options["dtype"] = self._gate_dtype()
        if router == "mlp":
            self.router = Router(self.in_features, num_experts, router_hidden, **options)
        else:
            self._set_gate(
                torch.zeros(num_experts, self.in_features, **options),
                torch.zeros(num_experts, **options),
            )

    def _set_gate(self, gate_weight: Tensor, gate_bias: Tensor) -> None:
        self.router, self._split = None, None
        self.gate_weight, self.gate_bias = nn.Parameter(gate_weight), nn.Parameter(gate_bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int = 8,
        num_experts: int = 2,
        gate: str = "sigmoid",
        *,
        router: str = "linear",
        scaling: float | Sequence[float] = 2.0,
        router_hidden: int = 512,
    ) -> "MoGULinear":
        """A routed projection around `linear`, whose parameters it shares (no copy of weight).

        An `nn.Linear` with a plain weight is fused. Any other linear (quantised by torchao or
        bitsandbytes, or foreign, with `in_features` and `out_features`) is called as it is, with
        one launch before and one after; with routing off nothing but it runs. `module.base` is
        `linear` itself, so that the swap can be undone.

        Raises:
            TypeError: `linear` has no `in_features` and `out_features`, is routed already, or has
                parameters or buffers of the names that routing adds.
        """
        if not hasattr(linear, "in_features") or not hasattr(linear, "out_features"):
            raise TypeError(
                f"{type(linear).__name__} has no in_features and out_features: it cannot be routed"
            )
        if isinstance(linear, cls):
            raise TypeError("this projection is routed already: detach it first")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.in_features = int(linear.in_features)  # pyright: ignore[reportArgumentType]
        module.out_features = int(linear.out_features)  # pyright: ignore[reportArgumentType]
        for kind in ("_parameters", "_buffers", "_modules"):
            getattr(module, kind).update(getattr(linear, kind))
        if taken := {"lora_A", "lora_B", "router", *_GATE_PARAMETERS} & set(dir(module)):
            raise TypeError(
                f"{type(linear).__name__} has {', '.join(sorted(taken))} of its own: merge or "
                "unload its adapters first"
            )
        object.__setattr__(module, "base", linear)  # not a child: its parameters are ours
        module.is_fused = _is_plain(linear)
        like = next((t for t in _tensors(linear) if t.dtype in _DTYPES), torch.empty(0))
        module._add_experts(rank, num_experts, gate, router, scaling, router_hidden, like)
        return module.train(linear.training)

    def fold_(self) -> "MoGULinear":
        """Replace an "mlp" router by its exact fold, in place; the unfolded linears are dropped."""
        if self.router is not None:
            with torch.no_grad():
                self._set_gate(*self.router.fold(self._gate_dtype()))
        return self

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if not self.routing.enabled:
            if self.is_fused:
                return F.linear(hidden_states, self.weight, self.bias)
            self.synchronise_base()
            return self.base(hidden_states)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        routed = self.routing.tokens(hidden_states)
        if not self.is_fused:
            self.synchronise_base()
            shrunk, total, gates = self._shrink([self], x, routed)
            y = self.base(hidden_states).reshape(-1, self.out_features)
            y = ops.gated_expand_(y, shrunk[0].to(y.dtype), total[0], self.lora_B.to(y.dtype))
            gates = gates[0]
        elif self.shared_input is not None and self.shared_input.serves(x):
            shrunk, total, gates = self.shared_input.take(self, hidden_states, x, routed)
            y = ops.gated_linear(x, self.weight, self.bias, shrunk, total, self.lora_B)
        else:
            recording = self.routing.log is not None
            weight, bias, lora_A, lora_B = _parameters(self, "weight", "bias", "lora_A", "lora_B")
            gate_weight, gate_bias = self.router_operands(x)
            out: Any = ops.mogu_linear(
                x,
                weight,
                bias,
                lora_A,
                lora_B,
                gate_weight,
                gate_bias,
                scaling=self.scaling,
                gate=self.gate,
                routed=routed,
                return_gates=recording,
            )
            y, gates = out if recording else (out, None)
        if self.is_fused and self.routing.keeps_bits(x):
            y = torch.where(cast(Tensor, routed)[:, None], y, F.linear(x, self.weight, self.bias))
        if gates is not None:
            self.routing.record(self._log_name, gates, hidden_states)
        return y.view(*hidden_states.shape[:-1], self.out_features)

    @staticmethod
    def _shrink(members: "Sequence[MoGULinear]", x: Tensor, routed: Tensor | None):
        """Shrunk [P, M, E * r], total [P, M] and gates [P, M, E] of P projections of x."""
        routers = [module.router_operands(x) for module in members]
        return ops.shrink_gate(
            x,
            [module.lora_A.to(x.dtype) for module in members],
            [gate_weight for gate_weight, _ in routers],
            [gate_bias for _, gate_bias in routers],
            scaling=members[0].scaling,
            gate=members[0].gate,
            routed=routed,
            return_gates=True,
        )

    def router_operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """gate_weight and gate_bias, folded, as the kernel for x reads them."""
        if self.router is None:
            gate_weight, gate_bias = _parameters(self, *_GATE_PARAMETERS)
        else:
            gate_weight, gate_bias = self.router.fold(self._gate_dtype())
        if x.device.type == "cpu" or x.dtype == torch.float32:
            return gate_weight, gate_bias
        if torch.is_autocast_enabled(x.device.type):  # the op decides on the dtype
            return gate_weight, gate_bias
        # half-precision dots read a high and a low part
        if self.router is not None or gate_weight.requires_grad or torch.compiler.is_compiling():
            return split_gate_weight(gate_weight, x.dtype), gate_bias
        version = 0 if gate_weight.is_inference() else gate_weight._version
        key = (gate_weight.data_ptr(), version, x.dtype)
        if self._split is None or self._split_key != key:
            self._split, self._split_key = split_gate_weight(gate_weight, x.dtype), key
        return self._split, gate_bias

    def extra_repr(self) -> str:
        """`nn.Linear`'s, and the routing."""
        kind = "mlp" if self.router is not None else "linear"
        bias = self._parameters.get("bias") is not None
        base = "" if self.is_fused else f", base={type(self.base).__name__}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, "
            f"rank={self.rank}, num_experts={self.num_experts}, gate={self.gate}, router={kind}"
            + base
        )

    def _gate_dtype(self) -> torch.dtype:
        return torch.promote_types(self.lora_A.dtype, torch.float32)

    def _apply(self, fn, recurse=True):
        """`.to()`, `.half()` and kin: the folded router follows the device, but stays wide."""
        gates = [self._parameters.get(name) for name in _GATE_PARAMETERS]
        gates += [gate.grad for gate in gates if gate is not None]
        self._split = None

        def keep_wide(tensor):
            moved = fn(tensor)
            if not any(tensor is gate for gate in gates):
                return moved
            wide = torch.promote_types(moved.dtype, torch.float32)
            return moved if moved.dtype == wide else tensor.to(moved.device, wide)

        super()._apply(keep_wide, recurse)
        self.synchronise_base()
        return self

    def synchronise_base(self) -> None:
        """Give `base` the parameters and buffers that this module holds in its place."""
        if self.base is not None and not torch.compiler.is_compiling():
            for kind in ("_parameters", "_buffers"):
                ours, theirs = getattr(self, kind), getattr(self.base, kind)
                theirs.update({name: ours[name] for name in theirs})


class SharedInput:
    """Projections that read the same hidden states, as q, k and v: one shrink serves them all.

    The first to be called shrinks for every member; the others find theirs ready, if they are given
    the very same tensor. That pays where a projection takes two launches, and only there.
    """

    def __init__(self, members: Sequence[MoGULinear]):
        self.members = list(members)
        self._clear()

    @staticmethod
    def can_share(modules: Sequence[MoGULinear]) -> bool:
        """Whether one launch can shrink for all of them."""
        kinds = {(m.rank, m.num_experts, m.gate, *m.scaling, m.in_features) for m in modules}
        return len(modules) > 1 and len(kinds) == 1 and all(m.is_fused for m in modules)

    def serves(self, x: Tensor) -> bool:
        """Whether x is to be shrunk for all members at once."""
        if torch.compiler.is_compiling():  # a compiled graph keeps no state between modules
            return False
        if any(is_wrapped(member) for member in self.members):
            return False
        first = self.members[0]
        return ops.takes_two_launches(x, first.num_experts * first.rank) and not any(
            ops.needs_grad(x, *m.parameters()) for m in self.members
        )

    def take(
        self, module: MoGULinear, hidden_states: Tensor, x: Tensor, routed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Shrunk [M, E * r], total [M] and gates [M, E] of one member."""
        place = next(p for p, member in enumerate(self.members) if member is module)
        state = module.routing.sequences
        if self._input is not hidden_states or self._state is not state or place in self._taken:
            self._input, self._state, self._taken = hidden_states, state, set()
            self._results = MoGULinear._shrink(self.members, x, routed)
        self._taken.add(place)
        results = tuple(tensor[place] for tensor in self._results)
        if len(self._taken) == len(self.members):
            self._clear()
        return results[0], results[1], results[2]

    def __getstate__(self):
        """Copies and pickles carry the members and nothing of a call."""
        return {"members": self.members}

    def __setstate__(self, state):
        """See `__getstate__`."""
        self.members = state["members"]
        self._clear()

    def _clear(self) -> None:
        self._input = self._state = None
        self._taken: set[int] = set()
        self._results: tuple[Tensor, ...] = ()


class MoGUGatedMLP(nn.Module):
    """A gated MLP (SwiGLU, GeGLU) whose gate_proj and up_proj are routed, in one GEMM kernel.

    Semantics:
        y = down_proj(activation(gate_proj(hidden_states)) * up_proj(hidden_states))

    where the product is rounded once. It holds the three projections under the names that the
    model gives them, so `state_dict` keys and module names stay. With routing off, or where a
    projection is not fused, the three modules are called one by one.

    Args:
        gate_proj: routed; up_proj as well, of the same shape, rank, experts, gate and scaling.
        up_proj: see gate_proj.
        down_proj: any module.
        activation: "silu", "gelu" or "gelu_tanh".
        act_fn: the module that the plain path applies; one for `activation` if None.

    Raises:
        ValueError: projections that do not go together, or an unknown activation.
    """

    base: Any

    def __init__(
        self,
        gate_proj: MoGULinear,
        up_proj: MoGULinear,
        down_proj: nn.Module,
        activation: str = "silu",
        act_fn: nn.Module | None = None,
    ):
        """See the class."""
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: take one of {', '.join(ACTIVATIONS)}")
        if not self.can_fuse(gate_proj, up_proj):
            raise ValueError(f"{gate_proj} and {up_proj} do not go together: take two of one kind")
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.activation = activation
        self.act_fn = ACTIVATIONS[activation]() if act_fn is None else act_fn
        object.__setattr__(self, "base", None)

    @staticmethod
    def can_fuse(gate_proj: MoGULinear, up_proj: MoGULinear) -> bool:
        """Whether one kernel can compute both."""
        alike = gate_proj.out_features == up_proj.out_features
        biases = (gate_proj.bias is None) == (up_proj.bias is None)
        return alike and biases and SharedInput.can_share([gate_proj, up_proj])

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., in_features] -> [..., down_proj.out_features]."""
        pair = (self.gate_proj, self.up_proj)
        if not all(m.routing.enabled and m.is_fused and not is_wrapped(m) for m in pair):
            gated = self.act_fn(self.gate_proj(hidden_states))
            return self.down_proj(gated * self.up_proj(hidden_states))
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weight, bias, lora_A, lora_B = zip(
            *(_parameters(module, "weight", "bias", "lora_A", "lora_B") for module in pair),
            strict=True,
        )
        gate_weight, gate_bias = zip(*(module.router_operands(x) for module in pair), strict=True)
        recording = any(module.routing.log is not None for module in pair)
        routed = pair[0].routing.tokens(hidden_states)
        out: Any = ops.gated_mlp(
            x,
            weight,
            None if bias[0] is None else bias,
            lora_A,
            lora_B,
            gate_weight,
            gate_bias,
            scaling=pair[0].scaling,
            activation=self.activation,
            gate=pair[0].gate,
            routed=routed,
            return_gates=recording,
        )
        y, gates = out if recording else (out, ())
        if pair[0].routing.keeps_bits(x):
            gate_proj, up_proj = (F.linear(x, w, b) for w, b in zip(weight, bias, strict=True))
            y = torch.where(cast(Tensor, routed)[:, None], y, self.act_fn(gate_proj) * up_proj)
        for module, own in zip(pair, gates, strict=False):
            module.routing.record(module._log_name, own, hidden_states)
        return self.down_proj(y.view(*hidden_states.shape[:-1], y.shape[-1]))

    def extra_repr(self) -> str:
        """The activation."""
        return f"activation={self.activation}"


ACTIVATIONS = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _is_plain(linear: nn.Module) -> bool:
    """Whether calling `linear` is one GEMM with a plain weight, and nothing more."""
    return (
        isinstance(linear, nn.Linear)
        and type(linear).forward is nn.Linear.forward
        and has_plain_weight(linear)
    )


def is_wrapped(module: nn.Module) -> bool:
    """Whether its forward was replaced, as accelerate does to bring offloaded weights in time."""
    return "forward" in module.__dict__


def has_plain_weight(linear: nn.Module) -> bool:
    """Whether its weight can be read by a kernel, and nothing but its class's forward is called."""
    weight = linear._parameters.get("weight")
    return (
        not is_wrapped(linear)
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and weight is not None
        and type(weight.data) is Tensor
        and weight.dtype in _DTYPES
        and list(weight.shape) == [linear.out_features, linear.in_features]
    )


def _parameters(module: nn.Module, *names: str) -> Any:
    """Parameters by name, looked up where `nn.Module` keeps them: its own way takes 0.6 us each."""
    kept = module._parameters
    return [kept[name] if name in kept else getattr(module, name) for name in names]


def _tensors(module: nn.Module) -> Sequence[Tensor]:
    return [*module.parameters(), *module.buffers()]
