"""Where the base model's cache comes from when the routed tokens are done.

    replay    at the hand-over it reads prompt and routed tokens at once, as published
    shadow    it reads a part of the prompt beside every routed token: in the same pass where the
              cache allows it, in one of its own elsewhere
    keep      it goes on with the routed cache: an approximation

Layers below the first routed projection see the same inputs in both passes: their keys and values
are computed once, and the base model's pass begins above them.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mogu_kernels.modules import is_wrapped
from mogu_kernels.state import routed_modules, routed_state

_ATTENTIONS = ("sdpa", "eager")  # those that take a mask of any shape
# Prompts of more tokens are read apart: what a second pass costs, the weights, is then less than
# attention to the other pass's columns, which a packed one works out and masks.
LONGEST_PACKED = 512


def has_fixed_positions(config: Any) -> bool:
    """Whether a token's place alone says how it is rotated, not how much is read with it."""
    nested = [getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)]
    while nested:
        values = nested.pop()
        if not isinstance(values, dict):
            continue
        if values.get("rope_type", values.get("type")) in ("dynamic", "longrope"):
            return False
        nested += values.values()
    return True


class Sequences:
    """Token ids so far, and what goes with every token.

    Args:
        input_ids: [batch, tokens].
        kwargs: for the model's forward, as transformers prepared them.
    """

    def __init__(self, input_ids: Tensor, kwargs: dict[str, Any]):
        self.rest = dict(kwargs)
        self.ids = input_ids
        self.prompt = input_ids.shape[1]
        self.mask: Tensor | None = self.rest.pop("attention_mask", None)
        self.positions: Any = self.rest.pop("position_ids", None)
        self.cache: Any = self.rest.pop("past_key_values", None)
        if self.cache is None or not self.rest.get("use_cache", True):
            raise ValueError("routed decoding needs a KV cache: leave use_cache=True")
        if self.cache.get_seq_length():
            raise ValueError(
                f"past_key_values hold {self.cache.get_seq_length()} tokens, but not whether they "
                "were routed: begin with an empty cache"
            )

    def append(self, tokens: Tensor) -> None:
        """One more token of every sequence, [batch]."""
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        if self.positions is not None:
            self.positions = torch.cat([self.positions, self.positions[..., -1:] + 1], -1)

    def __len__(self):
        """Tokens of every sequence."""
        return self.ids.shape[1]


class Pass:
    """The model's way through the sequences with one cache, routed or not."""

    def __init__(self, model: Any, sequences: Sequences, cache: Any, enabled: bool | Tensor):
        self.model, self.sequences, self.state = model, sequences, routed_state(model)
        self.cache, self.enabled, self.read = cache, enabled, 0

    def advance(self, stop: int) -> Tensor:
        """Read the tokens up to `stop`: logits [batch, vocabulary] after the last one, fp32."""
        s = self.sequences
        kwargs = s.rest | {"past_key_values": self.cache}
        if s.mask is not None:
            kwargs["attention_mask"] = s.mask[:, :stop]
        if s.positions is not None:
            kwargs["position_ids"] = s.positions[..., :stop]
        inputs = self.model.prepare_inputs_for_generation(
            s.ids[:, :stop],
            next_sequence_length=stop - self.read,
            is_first_iteration=self.read == 0,
            **kwargs,
        )
        with self.state.routed(self.enabled):
            out = self.model(**inputs, return_dict=True)
        if out.get("past_key_values") is not None:  # some models begin anew where positions change
            self.cache = out.past_key_values
        self.read = stop
        return out.logits[:, -1].float()


class Keep:
    """Go on with the routed cache and the base weights.

    Args:
        model: with routed projections.
        sequences: with an empty cache.
        enabled: which sequences are routed.
        routed_tokens: m; None for all.
    """

    def __init__(
        self,
        model: Any,
        sequences: Sequences,
        enabled: bool | Tensor,
        routed_tokens: int | None,
    ):
        self.sequences, self.routed_tokens = sequences, routed_tokens
        self.routed = Pass(model, sequences, sequences.cache, enabled)
        self.base = Pass(model, sequences, sequences.cache, False)
        self.step = 0

    def next_logits(self) -> Tensor:
        """Logits [batch, vocabulary] of the next token."""
        step, self.step = self.step, self.step + 1
        if self.routed_tokens is None or step < self.routed_tokens:
            return self.routed_logits(step)
        if step == self.routed_tokens:
            self.hand_over()
        return self.base.advance(len(self.sequences))

    def routed_logits(self, step: int) -> Tensor:
        """Of routed token `step`."""
        return self.routed.advance(len(self.sequences))

    def hand_over(self) -> None:
        """Before the base model's first token."""
        self.base.cache, self.base.read = self.routed.cache, self.routed.read


class Replay(Keep):
    """The base model reads everything at the hand-over."""

    def __init__(self, model, sequences, enabled, routed_tokens):
        super().__init__(model, sequences, enabled, routed_tokens)
        self.lower, self.in_parts = None, False
        if routed_tokens is None:
            return
        try:
            self.base.cache = copy.deepcopy(sequences.cache)  # empty still
        except TypeError as error:
            raise ValueError(
                f"{type(sequences.cache).__name__} cannot be copied ({error}), and the base model "
                'needs one of its own: take the dynamic or the "static" cache'
            ) from error
        self.in_parts = has_fixed_positions(model.config)
        if self.in_parts:
            self.lower = LowerLayers.of(model, sequences.cache)

    def routed_logits(self, step):
        """The layers below the first routed one leave their outputs for the base model."""
        if self.lower is None:
            return super().routed_logits(step)
        with self.lower.listen():
            return super().routed_logits(step)

    def hand_over(self):
        """Through the upper layers only, as far as the routed pass came."""
        if self.lower is not None and self.routed.read > self.base.read:
            self.lower.advance(self.base, self.routed, self.routed.read)


class Shadow(Replay):
    """The base model reads a part of the prompt beside every routed token."""

    def __init__(self, model, sequences, enabled, routed_tokens):
        super().__init__(model, sequences, enabled, routed_tokens)
        self.packed = None
        if routed_tokens and self.in_parts and self.lower is None:
            self.packed = Packed.of(self.routed, self.base)

    def routed_logits(self, step):
        """Of routed token `step`; the base model is a part of the prompt behind."""
        if step == 0 or not self.in_parts or self.routed_tokens is None:
            return super().routed_logits(step)
        # equal shares of prompt and routed tokens, so that no gap between two tokens stands out
        prompt, m = self.sequences.prompt, self.routed_tokens
        stop = min(prompt, (prompt + m) * step // m)
        if self.packed is not None:
            return self.packed.advance(stop)
        if stop > self.base.read:
            if self.lower is not None:
                self.lower.advance(self.base, self.routed, stop)
            else:
                self.base.advance(stop)
        return super().routed_logits(step)

    def hand_over(self):
        """The base model's columns become its cache."""
        if self.packed is not None:
            self.packed.separate()
        super().hand_over()


class Packed:
    """Both passes in one, over one cache: the weights are read once for the two of them.

    Every column of the cache belongs to one of them. A pass takes some tokens of the base model's
    and the last routed one; a mask lets each see its own columns only, and routing is on for that
    last token alone.
    """

    def __init__(self, routed: Pass, base: Pass):
        self.routed, self.base = routed, base
        self.is_base = torch.zeros(routed.sequences.prompt, dtype=torch.bool)
        self.place = torch.arange(routed.sequences.prompt)  # in the sequence, of every column

    @classmethod
    def of(cls, routed: Pass, base: Pass) -> "Packed | None":
        """None where columns cannot be of two kinds, or attention does not take such a mask."""
        from transformers.cache_utils import DynamicLayer

        layers, config, sequences = routed.cache.layers, routed.model.config, routed.sequences
        fits = (
            bool(layers)
            and sequences.prompt <= LONGEST_PACKED
            and all(type(layer) is DynamicLayer for layer in layers)
            and getattr(config, "_attn_implementation", None) in _ATTENTIONS
            and sequences.positions is not None
            and not getattr(config, "alibi", False)  # made of a mask [batch, tokens]
        )
        return cls(routed, base) if fits else None

    def advance(self, stop: int) -> Tensor:
        """Read the last token, routed, and the base model's up to `stop`: logits of the first."""
        s, model = self.routed.sequences, self.routed.model
        new = torch.cat([torch.arange(self.base.read, stop), torch.tensor([len(s) - 1])])
        is_base = torch.arange(len(new)) < len(new) - 1
        self.is_base = torch.cat([self.is_base, is_base])
        self.place = torch.cat([self.place, new])
        device, dtype = s.ids.device, model.dtype
        sees = (is_base[:, None] == self.is_base) & (self.place <= new[:, None])
        sees = sees.to(device).expand(len(s.ids), 1, -1, -1)
        if s.mask is not None:
            sees = sees & s.mask[:, self.place].bool()[:, None, None]
        hidden = torch.zeros(sees.shape, dtype=dtype, device=device)
        hidden.masked_fill_(~sees, torch.finfo(dtype).min)
        enabled = ~is_base.to(device).expand(len(s.ids), -1)
        own = torch.as_tensor(self.routed.enabled, device=device)
        enabled = enabled & own.view(-1, 1)
        with self.routed.state.routed(enabled, recorded=slice(-1, None)):
            out = model(
                input_ids=s.ids[:, new],
                attention_mask=hidden,
                position_ids=s.positions[..., new],
                past_key_values=self.routed.cache,
                return_dict=True,
                **s.rest,
            )
        self.routed.read, self.base.read = len(s), stop
        return out.logits[:, -1].float()

    def separate(self) -> None:
        """Leave the base model's columns."""
        for layer in self.routed.cache.layers:
            own = self.is_base.nonzero()[:, 0].to(layer.keys.device)
            layer.keys, layer.values = layer.keys[:, :, own], layer.values[:, :, own]
        self.base.cache = self.routed.cache


class LowerLayers:
    """The layers below the first routed projection: computed once, by the routed pass."""

    def __init__(self, layers: nn.ModuleList, first: int):
        self.layers, self.first = layers, first
        self.outputs: list[Tensor] = []  # of the last of them, pass by pass
        # for what a layer gives besides hidden states; None if it gives those alone
        self.others: tuple[None, ...] | None = None

    @classmethod
    def of(cls, model: Any, cache: Any) -> "LowerLayers | None":
        """None where the first layer is routed, or layers and their caches are not plain."""
        from transformers.cache_utils import DynamicLayer

        places = [name.split(".") for name in routed_modules(model)]
        numbers = {next((i for i, part in enumerate(p) if part.isdigit()), 0) for p in places}
        if len(numbers) > 1 or 0 in numbers:
            return None
        at = numbers.pop()
        containers = {".".join(place[:at]) for place in places}
        first = min(int(place[at]) for place in places)
        layers = model.get_submodule(containers.pop()) if len(containers) == 1 else None
        if not isinstance(layers, nn.ModuleList) or len(cache.layers) != len(layers):
            return None
        plain = all(type(layer) is DynamicLayer for layer in cache.layers[:first])
        wrapped = any(is_wrapped(layer) for layer in layers[:first])
        return cls(layers, first) if first and plain and not wrapped else None

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Note what leaves the lower layers."""

        def note(module, inputs, output):
            whole = isinstance(output, Tensor)
            self.outputs.append(output if whole else output[0])
            self.others = None if whole else (None,) * (len(output) - 1)

        handle = self.layers[self.first - 1].register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def advance(self, base: Pass, routed: Pass, stop: int) -> None:
        """Let the base model read up to `stop` from the first routed layer on."""
        hidden_states = torch.cat(self.outputs, 1)[:, base.read : stop]
        with self._skipped(hidden_states):
            base.advance(stop)
        self._share(base.cache, routed.cache, stop)

    def _share(self, cache: Any, source: Any, tokens: int) -> None:
        """The lower layers' keys and values of so many tokens: views of the routed pass's."""
        for number in range(self.first):
            layer = copy.copy(source.layers[number])
            layer.keys, layer.values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]
            cache.layers[number] = layer

    @contextlib.contextmanager
    def _skipped(self, hidden_states: Tensor) -> Iterator[None]:
        """Lower layers give `hidden_states`, which the first routed one takes from the last."""
        lower: Any = self.layers[: self.first]
        given = hidden_states if self.others is None else (hidden_states, *self.others)
        for layer in lower:
            layer.forward = lambda *args, **kwargs: given
        try:
            yield
        finally:
            for layer in lower:
                del layer.forward


HANDOFFS = {"shadow": Shadow, "replay": Replay, "keep": Keep}
