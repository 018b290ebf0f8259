"""The published procedure in a continuously batched engine.

A request's first m answer tokens come from the routed model, the others from the base model, which
reads prompt and routed tokens itself: its cache may hold nothing that a routed pass computed. That
is what vLLM does to a request that it preempts: its blocks are given back and computed anew. So a
request is handed over by preempting it, once, when its m-th token is there. Until then its blocks
are hashed with a secret salt, so that prefix caching never shares them with the base's; afterwards
with its own, so that they are shared with every base request that has the same beginning.

A request that vLLM preempts for want of memory needs nothing more: its tokens say which pass it is
in, and that pass computes all of its blocks again.
"""

import secrets
import time
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from mogu_kernels.vllm_plugin.settings import Settings

logger = init_logger("vllm.mogu")


class _HandsOver:
    """Mixed into both of vLLM's schedulers."""

    def __init__(self: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.mogu = Settings.of(self.vllm_config)
        self._routed_salt = f"mogu-{secrets.token_hex(16)}"  # no request can ask for it
        self._base_salts: dict[str, str | None] = {}  # of the requests that are in a routed pass
        self._handed_over: list[Request] = []

    def add_request(self: Any, request: Request) -> None:
        params = request.sampling_params
        if params is not None and self.mogu.routed_tokens(params.extra_args):
            self._base_salts[request.request_id] = request.cache_salt
            _salt(request, f"{self._routed_salt}{request.cache_salt or ''}")
            if request.resumable:
                logger.warning("MoGU: %s is a streaming session, refused", request.request_id)
                request.abort_immediately = True  # a later turn would go on from routed blocks
        super().add_request(request)

    def _update_request_with_output(self: Any, request: Request, *args: Any, **kwargs: Any) -> Any:
        tokens, stopped = super()._update_request_with_output(request, *args, **kwargs)
        if request.request_id in self._base_salts:
            routed = self.mogu.routed_tokens(request.sampling_params.extra_args)
            if not stopped and request.num_output_tokens >= routed:
                self._handed_over.append(request)
        return tokens, stopped

    def update_from_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(*args, **kwargs)
        for request in self._handed_over:
            self._hand_over(request)
        self._handed_over.clear()
        return outputs

    def _hand_over(self: Any, request: Request) -> None:
        """From here on the base model reads and writes this request."""
        if request.is_finished():
            return
        _salt(request, self._base_salts.pop(request.request_id))
        if request.status == RequestStatus.RUNNING:
            self.running.remove(request)
            # a token that is being computed already was to follow the routed cache: it is dropped
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)
            self.prev_step_scheduled_req_ids.discard(request.request_id)

    def _free_request(self: Any, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._base_salts.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)


def _salt(request: Request, salt: str | None) -> None:
    """Hash the request's blocks with another salt."""
    request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()


class RoutedScheduler(_HandsOver, Scheduler):
    """vLLM's scheduler, with hand-overs."""


class RoutedAsyncScheduler(_HandsOver, AsyncScheduler):
    """Likewise, one step ahead of the workers."""
