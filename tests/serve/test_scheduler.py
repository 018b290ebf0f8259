"""The hand-over in both of vLLM's schedulers, against a cache that remembers who wrote it.

The model here is a checksum over all that the cache holds for a request, and over the pass that
wrote it: one block of another pass, or of another request, and every later token is another.
"""

import random
import zlib
from collections import deque

import pytest
import torch

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from mogu_kernels.vllm_plugin.scheduler import RoutedAsyncScheduler, RoutedScheduler
from mogu_kernels.vllm_plugin.settings import THROUGHOUT
from tests.serve.conftest import CHECKPOINT

BLOCK = 4
ANSWER = 20
ROUTED = {None: 5, 0: 0, 1: 1, 7: 7, "all": THROUGHOUT}  # what is asked for, and what is meant


def next_token(cache: list[tuple[int, bool]]) -> int:
    """From (token, written by a routed pass) of everything so far."""
    return 3 + zlib.crc32(repr(cache).encode()) % 1000


def expected(prompt: list[int], routed: int) -> list[int]:
    """The published procedure."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + ANSWER:
        now = len(tokens) - len(prompt) < routed
        tokens.append(next_token([(token, now) for token in tokens]))
    return tokens[len(prompt) :]


class Worker:
    """Runs what the scheduler says, as a model runner does."""

    def __init__(self, routed: dict[str, int]):
        self.routed, self.cache = routed, {}
        self.tokens, self.blocks, self.prompts = {}, {}, {}

    def run(self, step) -> ModelRunnerOutput:
        """One pass."""
        computed = {}
        for new in step.scheduled_new_reqs:
            self.tokens[new.req_id] = list(new.prompt_token_ids)
            self.prompts[new.req_id] = len(new.prompt_token_ids)
            self.blocks[new.req_id] = list(new.block_ids[0])
            computed[new.req_id] = new.num_computed_tokens
        cached = step.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            new_blocks = cached.new_block_ids[i]
            if name in cached.resumed_req_ids:
                self.blocks[name] = []
            if name in cached.all_token_ids:
                self.tokens[name] = list(cached.all_token_ids[name])
            self.blocks[name] += new_blocks[0] if new_blocks else []
            computed[name] = cached.num_computed_tokens[i]
        names = list(step.num_scheduled_tokens)
        sampled = [self._compute(n, computed[n], step.num_scheduled_tokens[n]) for n in names]
        return ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, sampled)

    def _compute(self, name: str, start: int, count: int) -> list[int]:
        tokens, blocks = self.tokens[name], self.blocks[name]
        routed = len(tokens) - self.prompts[name] < self.routed[name]
        for i in range(start, start + count):
            self.cache[blocks[i // BLOCK], i % BLOCK] = tokens[i], routed
        if start + count < len(tokens):
            return []
        held = [self.cache[blocks[i // BLOCK], i % BLOCK] for i in range(len(tokens))]
        tokens.append(next_token(held))
        return tokens[-1:]


@pytest.fixture(scope="module")
def config(model_folder):
    """Of an engine with few tokens in a step, so that prompts are read in chunks."""
    return EngineArgs(
        model=str(model_folder),
        max_model_len=256,
        max_num_batched_tokens=256,
        max_num_seqs=6,
        block_size=32,
        additional_config={"mogu": str(CHECKPOINT)},
    ).create_engine_config()


def make_scheduler(kind, config, blocks):
    """With blocks of `BLOCK` tokens."""
    config.cache_config.num_gpu_blocks, config.cache_config.block_size = blocks, BLOCK
    init_none_hash(sha256)
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    caches = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    return kind(config, caches, StructuredOutputManager(config), BLOCK, log_stats=True)


def make_request(name, prompt, asked, salt):
    """`asked` is what its extra arguments say, or None."""
    extra = {} if asked is None else {"mogu_routed_tokens": asked}
    params = SamplingParams(max_tokens=ANSWER, ignore_eos=True, extra_args=extra)
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(name, prompt, params, None, cache_salt=salt, block_hasher=hasher)


def test_blocks_are_shared_within_a_pass_and_a_tenant_only(config):
    """By the hash of the first block, which prefix caching looks up."""
    scheduler, prompt = make_scheduler(RoutedScheduler, config, 500), list(range(3, 20))
    hashes = {}
    for asked in (0, None, "all"):
        for salt in (None, "tenant", scheduler._routed_salt + "-guessed"):
            request = make_request(f"{asked} {salt}", prompt, asked, salt)
            own = request.block_hashes[0]
            scheduler.add_request(request)
            hashes[asked, salt] = request.block_hashes[0]
            assert (request.block_hashes[0] == own) is (asked == 0)
    for salt in (None, "tenant"):
        assert hashes[None, salt] == hashes["all", salt]
    assert len(set(hashes.values())) == 6


@pytest.mark.parametrize("kind", [RoutedScheduler, RoutedAsyncScheduler])
@pytest.mark.parametrize("blocks", [40, 500], ids=["preempting", "roomy"])
@pytest.mark.parametrize("seed", range(3))
def test_every_cache_is_of_one_pass(config, kind, blocks, seed, monkeypatch):
    """Requests with common beginnings, chunked prompts, preemption, aborts; both schedulers."""
    rng = random.Random(seed)
    monkeypatch.setattr(config.scheduler_config, "async_scheduling", kind is RoutedAsyncScheduler)
    scheduler = make_scheduler(kind, config, blocks)
    scheduler.max_num_scheduled_tokens = 24
    beginning = [rng.randrange(3, 1003) for _ in range(40)]
    waiting, prompts, routed = deque(), {}, {}
    for i in range(18):
        name, asked = str(i), rng.choice(list(ROUTED))
        prompts[name] = [*beginning[: rng.randrange(8, 40)], rng.randrange(3, 1003)]
        routed[name] = ROUTED[asked]
        salt = rng.choice([None, None, "tenant"])
        waiting.append(make_request(name, prompts[name], asked, salt))
    worker, in_flight, answers, preempted = Worker(routed), deque(), {}, 0
    depth = 2 if kind is RoutedAsyncScheduler else 1
    aborted = rng.sample(list(prompts), 2)
    requests = {request.request_id: request for request in waiting}
    for _ in range(2000):
        if waiting and rng.random() < 0.4:
            scheduler.add_request(waiting.popleft())
        step = scheduler.schedule()
        in_flight.append((step, worker.run(step)))
        if len(in_flight) == depth or not step.num_scheduled_tokens:
            for outputs in scheduler.update_from_output(*in_flight.popleft()).values():
                for output in outputs.outputs:
                    answers.setdefault(output.request_id, []).extend(output.new_token_ids)
        for name in list(aborted):
            if len(answers.get(name, [])) > 3:
                scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
                aborted.remove(name)
        if not waiting and not scheduler.get_num_unfinished_requests():
            break
    else:
        pytest.fail("the scheduler does not come to an end")
    preempted = sum(request.num_preemptions for request in requests.values())
    for name, prompt in prompts.items():
        wanted = expected(prompt, routed[name])
        found = answers[name]
        assert found == wanted[: len(found)], f"request {name}, {routed[name]} routed tokens"
        assert len(found) == ANSWER or requests[name].status == RequestStatus.FINISHED_ABORTED
    handed_over = sum(0 < tokens < ANSWER for tokens in routed.values())
    assert preempted > handed_over if blocks == 40 else preempted <= handed_over
