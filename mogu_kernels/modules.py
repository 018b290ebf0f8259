"""`MoGULinear`, the drop-in projection, and the contexts that act on all of a model's."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mogu_kernels import ops
from mogu_kernels.router import Router, split_gate_weight

_GATE_PARAMETERS = ("gate_weight", "gate_bias")


@dataclasses.dataclass
class RoutingState:
    """What the routed modules of one model share; copied with the model, restored by contexts.

    Attributes:
        enabled: False makes every module the plain linear it replaced.
        sequences: bool [batch], the sequences of the batch to route; None routes all.
        log: while gates are recorded, a list of gates per module name.
    """

    enabled: bool = True
    sequences: Tensor | None = None
    log: dict[str, list[Tensor]] | None = None


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
        lora_A: [E, r, K], lora_B [E, N, r].
        gate_weight: [E, K] and gate_bias [E] in fp32, unless `router` holds the unfolded linears.

    Raises:
        ValueError: an unknown gate or router kind, or hidden states of another width.

    Source: MoGU, arXiv 2405.14488, section 3.2.
    """

    base: nn.Linear | None
    router: Router | None
    gate_weight: nn.Parameter
    gate_bias: nn.Parameter
    _log_name: str

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
        self._add_experts(rank, num_experts, gate, router, scaling, router_hidden)

    def _add_experts(self, rank, num_experts, gate, router, scaling, router_hidden):
        if gate not in ("sigmoid", "softmax"):
            raise ValueError(f'gate={gate!r}: take "sigmoid" or "softmax"')
        if router not in ("linear", "mlp"):
            raise ValueError(f'router={router!r}: take "linear" or "mlp"')
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.rank, self.num_experts, self.gate = rank, num_experts, gate
        self.scaling = ops.checks.scaling_per_expert(scaling, num_experts)
        self.routing = RoutingState()
        object.__setattr__(self, "base", None)
        lora_A = torch.empty(num_experts, rank, self.in_features, **like)
        self.lora_A = nn.Parameter(lora_A.uniform_(-1, 1) * self.in_features**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(num_experts, self.out_features, rank, **like))
        like["dtype"] = self._gate_dtype()
        if router == "mlp":
            self.router = Router(self.in_features, num_experts, router_hidden, **like)
        else:
            self._set_gate(
                torch.zeros(num_experts, self.in_features, **like),
                torch.zeros(num_experts, **like),
            )

    def _set_gate(self, gate_weight: Tensor, gate_bias: Tensor) -> None:
        self.router = None
        self.gate_weight, self.gate_bias = nn.Parameter(gate_weight), nn.Parameter(gate_bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int = 8,
        num_experts: int = 2,
        gate: str = "sigmoid",
        *,
        router: str = "linear",
        scaling: float | Sequence[float] = 2.0,
        router_hidden: int = 512,
    ) -> "MoGULinear":
        """A routed projection around `linear`, whose parameters it shares (no copy of weight).

        `module.base` is `linear` itself, so that the swap can be undone.

        Raises:
            TypeError: `linear` is not an `nn.Linear`, is routed already, or its weight is not a
            plain
                tensor (quantised weights are not supported yet).
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{type(linear).__name__} is not an nn.Linear: it cannot be routed")
        if isinstance(linear, cls):
            raise TypeError("this projection is routed already: detach it first")
        if type(linear.weight.data) is not Tensor:
            raise TypeError(
                f"weight is a {type(linear.weight.data).__name__}: take the unquantised model"
            )
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.in_features, module.out_features = linear.in_features, linear.out_features
        module.weight, module.bias = linear.weight, linear.bias
        module._add_experts(rank, num_experts, gate, router, scaling, router_hidden)
        object.__setattr__(module, "base", linear)  # not a child: its parameters are ours
        return module.train(linear.training)

    def fold_(self) -> "MoGULinear":
        """Replace an "mlp" router by its exact fold, in place; the unfolded linears are dropped."""
        if self.router is not None:
            with torch.no_grad():
                self._set_gate(*self.router.fold(self._gate_dtype()))
        return self

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        routing = self.routing
        if not routing.enabled:
            return F.linear(hidden_states, self.weight, self.bias)
        if self.router is None:
            gate_weight, gate_bias = self.gate_weight, self.gate_bias
        else:
            gate_weight, gate_bias = self.router.fold(self._gate_dtype())
        y, gates = ops.mogu_linear(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            self._operand(gate_weight, hidden_states),
            gate_bias,
            scaling=self.scaling,
            gate=self.gate,
            routed=self._routed_tokens(hidden_states),
            return_gates=True,
        )
        if routing.log is not None:
            name = self._log_name
            routing.log.setdefault(name, []).append(gates.view(*hidden_states.shape[:-1], -1))
        return y.view(*hidden_states.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """`nn.Linear`'s, and the routing."""
        kind = "mlp" if self.router is not None else "linear"
        return (
            f"{super().extra_repr()}, rank={self.rank}, num_experts={self.num_experts}, "
            f"gate={self.gate}, router={kind}"
        )

    def _gate_dtype(self) -> torch.dtype:
        return torch.promote_types(self.weight.dtype, torch.float32)

    def _routed_tokens(self, hidden_states: Tensor) -> Tensor | None:
        """The per-sequence mask as one entry a token."""
        sequences = self.routing.sequences
        if sequences is None:
            return None
        if hidden_states.ndim < 2 or len(sequences) != len(hidden_states):
            raise ValueError(
                f"the routing mask has {len(sequences)} sequences but hidden_states is "
                f"{list(hidden_states.shape)}"
            )
        mask = sequences.view(-1, *[1] * (hidden_states.ndim - 2))
        return mask.expand(hidden_states.shape[:-1]).reshape(-1)

    def _operand(self, gate_weight: Tensor, hidden_states: Tensor) -> Tensor:
        """The router as the device's kernel reads it: split where half-precision dots do."""
        if hidden_states.device.type == "cpu" or hidden_states.dtype == torch.float32:
            return gate_weight
        if gate_weight.requires_grad or torch.compiler.is_compiling():
            return split_gate_weight(gate_weight, hidden_states.dtype)
        key = (gate_weight.data_ptr(), gate_weight._version, hidden_states.dtype)
        if self.__dict__.get("_split_key") != key:
            self._split = split_gate_weight(gate_weight, hidden_states.dtype)
            self._split_key = key
        return self._split

    def _apply(self, fn, recurse=True):
        """`.to()`, `.half()` and kin: the folded router follows the device, but stays wide."""
        gates = [self._parameters.get(name) for name in _GATE_PARAMETERS]

        def keep_wide(tensor):
            moved = fn(tensor)
            if not any(tensor is gate for gate in gates):
                return moved
            return tensor.to(moved.device, torch.promote_types(moved.dtype, torch.float32))

        return super()._apply(keep_wide, recurse)


def routed_modules(model: nn.Module) -> dict[str, MoGULinear]:
    """The routed projections of `model` by name.

    Raises:
        ValueError: there is none.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, MoGULinear)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no routed projection: attach one first")
    return found


def _state(model: nn.Module) -> RoutingState:
    """The state that the routed modules of `model` share, made common if they have several."""
    modules = routed_modules(model).values()
    state = next(iter(modules)).routing
    for module in modules:
        module.routing = state
    return state


@contextlib.contextmanager
def routing(model: nn.Module, enabled: bool | Tensor) -> Iterator[None]:
    """Route, or do not, inside the context: all of the batch, or the sequences of a mask.

    Args:
        model: with routed projections in it.
        enabled: True, False, or bool [batch] on the model's device.

    Raises:
        TypeError: a mask that is not bool.
        ValueError: the model has no routed projection.
    """
    state = _state(model)
    if isinstance(enabled, Tensor) and enabled.dtype != torch.bool:
        raise TypeError(f"the routing mask is {enabled.dtype}: take a bool mask, one per sequence")
    before = state.enabled, state.sequences
    if isinstance(enabled, Tensor):
        state.enabled, state.sequences = True, enabled
    else:
        state.enabled, state.sequences = bool(enabled), None
    try:
        yield
    finally:
        state.enabled, state.sequences = before


@contextlib.contextmanager
def record_gates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record what every router says while the context is open.

    Yields:
        {module name: gates [batch, tokens, E]}, filled when the context closes: the tokens of all
        routed passes in order. Passes with routing off leave nothing.

    Raises:
        ValueError: the model has no routed projection, or gates are being recorded already.
    """
    state = _state(model)
    if state.log is not None:
        raise ValueError("gates are being recorded already: close that context first")
    for name, module in routed_modules(model).items():
        module._log_name = name
    gates: dict[str, Tensor] = {}
    state.log = {}
    try:
        yield gates
    finally:
        gates |= {name: torch.cat(passes, dim=-2) for name, passes in state.log.items()}
        state.log = None
