"""Which tokens of a pass are routed.

`RoutedBatch` is told by vLLM, before each pass, which request has which place in the batch. A
request is routed while it has fewer answer tokens than it may have routed ones; the pass that is
about to run computes the next. `Tokens` spreads that over the tokens of the pass, on the device and
in static memory, so that nothing here breaks a CUDA graph or waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from mogu_kernels.vllm_plugin.metrics import Counts, path_of
from mogu_kernels.vllm_plugin.settings import Settings, requested_tokens

logger = init_logger("vllm.mogu")

CONTEXT_KEY = "mogu.tokens"  # in vLLM's table of what custom ops look up by name


class Tokens:
    """The tokens of the pass that runs, in one model.

    Attributes:
        mask: bool [max_tokens], routed or not.
        rows: int64 [max_tokens], the place of each token's request in the batch.
        answering: bool [max_tokens], routed tokens whose gates choose an answer token.
        any: False if it is known that none is routed; only a CPU can know.
        layers: the routed layers by name, in the order in which they run.
        missing: projections of the checkpoint that no layer has taken yet.
        counts: what is counted; of the first rank only.
        greeting: said once, when every projection has its layer.
    """

    def __init__(
        self, modules: Sequence[str], max_tokens: int, max_requests: int, device: torch.device
    ):
        self.missing = set(modules)
        self.mask = torch.zeros(max_tokens, dtype=torch.bool, device=device)
        self.rows = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self.answering = torch.zeros(max_tokens, dtype=torch.bool, device=device)
        self.requests = torch.zeros(max_requests + 1, dtype=torch.bool, device=device)
        self._places = torch.arange(max_tokens, dtype=torch.int32, device=device)
        self._nobody = max_requests  # where tokens of no request are counted
        self.any = True
        self.greeting = ""
        self.layers: dict[str, Any] = {}
        self.counts: Counts | None = None

    @classmethod
    def of(cls, vllm_config: Any, device: torch.device) -> "Tokens":
        """Those of the model that this process loads or runs with `vllm_config`."""
        known = vllm_config.compilation_config.static_forward_context
        if CONTEXT_KEY not in known:
            settings, limits = Settings.of(vllm_config), vllm_config.scheduler_config
            assert settings is not None, "asked for only where there is a checkpoint"
            checkpoint = settings.load()
            tokens = cls(
                checkpoint.modules, limits.max_num_batched_tokens, limits.max_num_seqs, device
            )
            config = checkpoint.config
            tokens.greeting = (
                f"{settings.checkpoint} routes {len(checkpoint.modules)} projections for "
                f"{config.routed_tokens or 'all'} answer tokens ({config.gate} gates of "
                f"{', '.join(config.expert_names)})"
                + ("; requests may not turn it off" if settings.locked else "")
            )
            if settings.metrics is not None and get_tensor_model_parallel_rank() == 0:
                path = path_of(settings, vllm_config)
                tokens.counts = Counts(path, checkpoint, limits.max_num_seqs, device)
            known[CONTEXT_KEY] = tokens
        return known[CONTEXT_KEY]

    def add(self, name: str, layer: Any, modules: Sequence[str]) -> bool:
        """A layer takes some of the checkpoint's projections. Is it the first?"""
        self.layers[name] = layer
        self.missing.difference_update(modules)
        if not self.missing and self.counts is not None:
            logger.info("MoGU: %s", self.greeting)
        return len(self.layers) == 1

    def check(self) -> None:
        """Every projection of the checkpoint has its layer.

        Raises:
            RuntimeError: some have none, so that this model would be less safe than it says.
        """
        if self.missing:
            raise RuntimeError(
                f"vLLM's model has no layer for {', '.join(sorted(self.missing))} of the MoGU "
                "checkpoint: take one that routes other projections"
            )

    def spread(self) -> None:
        """Fill `mask`, `rows` and `answering` for this pass, from the requests' flags."""
        self.check()
        metadata = get_forward_context().attn_metadata
        if not metadata:  # a pass over nothing, to measure or to compile
            self.mask.zero_()
            self.any = self.mask.device.type != "cpu"
            return
        starts = _query_start_loc(metadata)
        torch.searchsorted(starts[1:], self._places, right=True, out=self.rows)
        self.rows.clamp_(max=self._nobody)
        torch.index_select(self.requests, 0, self.rows, out=self.mask)
        self.mask.logical_and_(self._places < starts[-1])
        last = torch.ones_like(self.mask)
        torch.ne(self.rows[1:], self.rows[:-1], out=last[:-1])
        torch.logical_and(self.mask, last, out=self.answering)
        if self.mask.device.type == "cpu":
            self.any = bool(self.requests.any())


def _query_start_loc(metadata: Any) -> Tensor:
    """[requests + 1], where each request's tokens begin; of any attention layer."""
    found = (getattr(layer, "query_start_loc", None) for layer in metadata.values())
    starts = next((starts for starts in found if starts is not None), None)
    if starts is None:  # never unrouted in silence
        kinds = ", ".join(sorted({type(layer).__name__ for layer in metadata.values()}))
        raise RuntimeError(
            f"{kinds} does not say where requests begin: take another --attention-backend"
        )
    return starts


@dataclass
class _Routed:
    """A request in the batch that may be routed.

    Attributes:
        tokens: how many of its answer are.
        answer: vLLM's own list of its answer so far, those being computed included.
        counted: its verdict has been taken.
    """

    tokens: int
    answer: Sequence[int]
    counted: bool = False

    @property
    def now(self) -> bool:
        return len(self.answer) < self.tokens


class RoutedBatch(LogitsProcessor):
    """Follows the batch; changes no logits.

    vLLM tells its logits processors, and nobody else, about the places of requests in the batch.
    """

    locked = False

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Check a request when it arrives: an error becomes HTTP 400 for that request alone."""
        requested_tokens(sampling_params.extra_args, locked=cls.locked)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        """See `LogitsProcessor`."""
        settings = Settings.of(vllm_config)
        assert settings is not None, "configured by engine.py only where there is a checkpoint"
        self.settings = settings
        self.tokens = Tokens.of(vllm_config, device)
        self.routed: dict[int, _Routed] = {}
        self.flags = torch.zeros_like(self.tokens.requests, device="cpu", pin_memory=is_pin_memory)

    def is_argmax_invariant(self) -> bool:
        """It is: nothing is changed."""
        return True

    def apply(self, logits: Tensor) -> Tensor:
        """The logits as they are."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Note who is routed in the pass that follows."""
        self.tokens.check()
        before = dict(self.routed)
        process_dict_updates(self.routed, batch_update, self._added)
        counts = self.tokens.counts
        if counts is not None:
            places = {id(request): place for place, request in self.routed.items()}
            stay = {p: places[id(r)] for p, r in before.items() if id(r) in places}
            ended = [place for place, request in before.items() if self._ends(request, places)]
            counts.follow(stay, ended, left=[p for p in before if p not in {*stay, *ended}])
        flags = torch.zeros_like(self.flags)
        for place, request in self.routed.items():
            flags[place] = request.now
        if not torch.equal(flags, self.flags):
            self.flags.copy_(flags)
            self.tokens.requests.copy_(self.flags, non_blocking=True)

    def _added(self, params: Any, _prompt: Any, answer: list[int]) -> _Routed | None:
        tokens = self.settings.routed_tokens(params.extra_args)
        return _Routed(tokens, answer) if len(answer) < tokens else None

    @staticmethod
    def _ends(request: _Routed, places: dict[int, int]) -> bool:
        """Whether a request's routing has just ended, or the request."""
        if request.counted or not request.answer or (id(request) in places and request.now):
            return False
        request.counted = True
        return True


class LockedRoutedBatch(RoutedBatch):
    """Where the operator has locked routing."""

    locked = True
