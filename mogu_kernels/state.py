"""What the routed modules of a model share, and the contexts that act on all of them."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Routing(NamedTuple):
    """What is routed in a pass: see `RoutingState`, which has an attribute for each."""

    enabled: bool = True
    sequences: Tensor | None = None
    recorded: slice = slice(None)


class RoutingState:
    """What the routed modules of one model share; copied with the model, restored by contexts.

    A context counts for the thread that opened it, so that threads may use one model at once; a
    thread without one routes everything. Compiled code, which cannot ask for its thread, follows
    the context that was opened last.

    Attributes:
        enabled: False makes every module the plain linear it replaced.
        sequences: bool [batch], the sequences of the batch to route, or bool [batch, tokens], the
            tokens of one pass; None routes all.
        recorded: the tokens of one pass whose gates are recorded.
        routed_tokens: answer tokens that the checkpoint routes; None for all.
        log: while gates are recorded, a list of gates per module name.
    """

    def __init__(self, routed_tokens: int | None = 5):
        self.routed_tokens = routed_tokens
        self.log: dict[str, list[Tensor]] | None = None
        self._everywhere, self._here = Routing(), threading.local()

    def __getstate__(self):
        """Copies and pickles begin with everything routed and nothing recorded."""
        return {"routed_tokens": self.routed_tokens}

    def __setstate__(self, state):
        """See `__getstate__`."""
        RoutingState.__init__(self, **state)

    @property
    def now(self) -> Routing:
        """Of this thread."""
        if torch.compiler.is_compiling():
            return self._everywhere
        return getattr(self._here, "routing", _ALL)

    @property
    def enabled(self) -> bool:
        """See the class."""
        return self.now.enabled

    @property
    def sequences(self) -> Tensor | None:
        """See the class."""
        return self.now.sequences

    def tokens(self, hidden_states: Tensor) -> Tensor | None:
        """The mask of sequences as one entry a token, or None.

        Raises:
            ValueError: the mask is for another batch.
        """
        mask = self.sequences
        if mask is None:
            return None
        if mask.ndim > 1 and mask.shape == hidden_states.shape[:-1]:
            return mask.reshape(-1)
        if mask.ndim > 1 or hidden_states.ndim < 2 or len(mask) != len(hidden_states):
            raise ValueError(
                f"the routing mask is {list(mask.shape)} but hidden_states is "
                f"{list(hidden_states.shape)}"
            )
        mask = mask.view(-1, *[1] * (hidden_states.ndim - 2))
        return mask.expand(hidden_states.shape[:-1]).reshape(-1)

    def keeps_bits(self, x: Tensor) -> bool:
        """Whether sequences that are not routed take `F.linear`'s bits, which on a CPU are others.

        That costs the plain projection once more, in batches with a mask of sequences only.
        """
        mask = self.sequences
        return mask is not None and mask.ndim == 1 and x.device.type == "cpu"

    @contextlib.contextmanager
    def routed(self, enabled: bool | Tensor, recorded: slice = slice(None)) -> Iterator[None]:
        """`routing` without looking for the modules, which takes a millisecond in a large model."""
        before = self.now
        mask = enabled if isinstance(enabled, Tensor) else None
        self._here.routing = self._everywhere = Routing(
            mask is not None or bool(enabled), mask, recorded
        )
        try:
            yield
        finally:
            self._here.routing = self._everywhere = before

    def record(self, name: str, gates: Tensor, hidden_states: Tensor) -> None:
        """Note the gates [M, E] of one pass of a module."""
        if self.log is not None and name:  # unnamed: outside the model that is being recorded
            gates = gates.view(*hidden_states.shape[:-1], gates.shape[-1])
            if self.now.recorded != slice(None):
                gates = gates[:, self.now.recorded]
            self.log.setdefault(name, []).append(gates)


_ALL = Routing()


def routed_modules(model: nn.Module) -> dict[str, Any]:
    """The routed projections of `model` by name.

    Raises:
        ValueError: there is none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "routing", None), RoutingState)
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no routed projection: attach one first")
    return found


def routed_state(model: nn.Module) -> RoutingState:
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
        enabled: True, False, bool [batch] on the model's device or, for one pass, bool
            [batch, tokens].

    Raises:
        TypeError: a mask that is not bool.
        ValueError: the model has no routed projection.
    """
    state = routed_state(model)
    if isinstance(enabled, Tensor) and enabled.dtype != torch.bool:
        raise TypeError(f"the routing mask is {enabled.dtype}: take a bool mask, one per sequence")
    if isinstance(enabled, Tensor) and enabled.ndim not in (1, 2):
        raise ValueError(f"the routing mask is {list(enabled.shape)}: take one entry per sequence")
    with state.routed(enabled):
        yield


@contextlib.contextmanager
def record_gates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record what every router says while the context is open.

    Yields:
        {module name: gates [batch, tokens, E]}, filled when the context closes: the tokens of all
        routed passes in order. Passes with routing off leave nothing.

    Raises:
        ValueError: the model has no routed projection, or gates are being recorded already.
    """
    state = routed_state(model)
    if state.log is not None:
        raise ValueError("gates are being recorded already: close that context first")
    modules = routed_modules(model)
    for name, module in modules.items():
        module._log_name = name or type(module).__name__
    gates: dict[str, Tensor] = {}
    state.log = {}
    try:
        yield gates
    finally:
        log, state.log = state.log, None
        for module in modules.values():
            module._log_name = ""
    for name, passes in log.items():
        if len({len(p) for p in passes}) > 1 or passes[0].ndim < 2:
            shapes = ", ".join(str(list(p.shape)) for p in passes)
            raise ValueError(f"gates of {name} have no common batch ({shapes}): record them apart")
        gates[name] = torch.cat(passes, dim=-2)
