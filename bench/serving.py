"""Throughput and memory of a vLLM engine with MoGU beside one without: `make bench-serving`.

Both engines live at once, each in a process of its own, and answer the same 32 requests in turns
(A B A B), so that a busy machine slows both. Prompts differ from round to round: the prefix cache
helps a request to find what its own round has left, as in service, and no more.
"""

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from tqdm import tqdm

from bench import machine
from bench.timing import spread
from demo.smollm2 import NAME, ensure_smollm2

RESULTS = Path("bench/results/serving.md")
CHECKPOINT = Path("demo/checkpoint")
REQUESTS = 32
TOPICS = ("bread", "rivers", "chess", "clouds", "bees", "glass", "maps", "violins")
ENGINES = {"base": {}, "routed": {"mogu": str(CHECKPOINT)}}


def engine(link: Any, additional: dict[str, str], tokens: int) -> None:
    """Answer rounds until None comes: send (seconds, resident bytes) back."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    folder = str(ensure_smollm2())
    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=REQUESTS,
        distributed_executor_backend="uni",
        additional_config=additional,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    link.send("ready")
    while (number := link.recv()) is not None:
        prompts = [_prompt(tokenizer, number, i) for i in range(REQUESTS)]
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        link.send((seconds, psutil.Process().memory_full_info().uss))


def _prompt(tokenizer: Any, number: int, i: int) -> dict[str, list[int]]:
    question = (
        f"Write {number + 2} facts about {TOPICS[i % len(TOPICS)]} for pupils of age {i + 6}."
    )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return {"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256])
    options = parser.parse_args()
    lines = [
        "# A routed vLLM engine beside a base one",
        "",
        f"{NAME}, fp32, {REQUESTS} concurrent requests, prompts of about 45 tokens; checkpoint "
        f"`{CHECKPOINT}`, its first five answer tokens routed. Medians and quartiles of "
        f"{options.rounds} interleaved rounds. Written by `make bench-serving`.",
        "",
        "| answer tokens | throughput, routed / base | memory, routed / base |",
        "|--:|--:|--:|",
    ]
    for tokens in options.tokens:
        seconds, memory = measure(tokens, options.rounds)
        speed = spread([a / b for a, b in zip(seconds["base"], seconds["routed"], strict=True)])
        lines.append(
            f"| {tokens} | {speed.median:.3f} ({speed.low:.3f} to {speed.high:.3f}) "
            f"| {memory['routed'] / memory['base']:.3f} |"
        )
    lines += ["", "```json", json.dumps(machine.describe(), indent=1), "```", ""]
    page = "\n".join(lines)
    RESULTS.write_text(page)
    Console().print(page, markup=False)


def measure(tokens: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each round and resident bytes after the last, by engine."""
    context = multiprocessing.get_context("spawn")
    links, processes = {}, []
    for name, additional in ENGINES.items():
        links[name], theirs = context.Pipe()
        processes.append(context.Process(target=engine, args=(theirs, additional, tokens)))
        processes[-1].start()
        theirs.close()
    for name in tqdm(links, "engines start", leave=False):
        links[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in links}
    memory: dict[str, float] = {}
    for number in tqdm(range(rounds + 1), f"{tokens} tokens", leave=False):
        for name, link in links.items():
            link.send(number)
            taken, memory[name] = link.recv()
            if number:  # the first round warms up
                seconds[name].append(taken)
    for link, process in zip(links.values(), processes, strict=True):
        link.send(None)
        process.join()
    return seconds, memory


if __name__ == "__main__":
    main()
