"""Throughput and memory of a vLLM engine with MoGU beside one without: `make bench-serving`.

Both engines live at once, each in a process of its own, and answer 32 requests in turns
(base, routed as published, routed throughout), so that a busy machine slows all. As published, the
base reads prompt and routed tokens once more; how much of that the prefix cache saves is up to what
prompts share, so there are two kinds. No question is asked twice.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from tqdm import tqdm

from bench import machine
from bench.timing import spread
from demo.smollm2 import CHECKPOINT, NAME, ensure_smollm2

RESULTS = Path("bench/results/serving.md")
REQUESTS = 32
# the model's own, shorter than a block of the cache, and one as services have it
SYSTEMS = {
    22: None,
    100: "You are the assistant of a school library. You answer questions of pupils between six "
    "and eighteen years of age. Choose words that a pupil of the age in question understands. Give "
    "facts that can be found in an encyclopaedia, one sentence each, and number them. If a "
    "question is about something that you do not know, say so and name a shelf of the library "
    "where the answer may be found. Do not ask questions back, and do not repeat the question.",
}
BLOCK = 32  # tokens; vLLM's default is 16 on GPUs, and 128 on CPUs
TOPICS = ("bread", "rivers", "chess", "clouds", "bees", "glass", "maps", "violins")
ENGINES = {"base": {}, "routed": {"mogu": str(CHECKPOINT)}}
# what is timed: (engine, what its requests say)
MODES: dict[str, tuple[str, dict[str, str] | None]] = {
    "base": ("base", None),
    "published": ("routed", None),
    "throughout": ("routed", {"mogu_routed_tokens": "all"}),
}


def engine(link: Any, additional: dict[str, str], system: str | None) -> None:
    """Answer (number, tokens, extra arguments) until None: send (seconds, resident bytes) back."""
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
        block_size=BLOCK,
        max_model_len=1024,
        max_num_seqs=REQUESTS,
        distributed_executor_backend="uni",
        additional_config=additional,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    link.send("ready")
    while (asked := link.recv()) is not None:
        number, tokens, extra = asked
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)
        prompts = [_prompt(tokenizer, system, number, i) for i in range(REQUESTS)]
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        ctypes.CDLL(None).malloc_trim(0)  # what is free is not the engine's
        link.send((seconds, psutil.Process().memory_full_info().uss))


def _prompt(tokenizer: Any, system: str | None, number: int, i: int) -> dict[str, list[int]]:
    topic = TOPICS[i % len(TOPICS)]
    question = f"For pupils of age {i + 6}: write {number + 2} facts about {topic}."
    said = [{"role": "system", "content": system}] if system else []
    text = tokenizer.apply_chat_template(
        [*said, {"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return {"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    options = parser.parse_args()
    lines = [
        "# A routed vLLM engine beside a base one",
        "",
        f"{NAME}, fp32, {REQUESTS} concurrent requests, questions of about 22 tokens behind a "
        f"system prompt; prefix caching in blocks of {BLOCK} tokens. Routed by `{CHECKPOINT}`: as "
        "published (five answer tokens, then the base reads the prompt itself) and throughout. "
        f"Medians and quartiles of {options.rounds} interleaved rounds. Written by "
        "`make bench-serving`.",
        "",
        "| tokens: system prompt | answer | throughput / base's: published | throughout "
        "| memory, routed / base |",
        "|--:|--:|--:|--:|--:|",
    ]
    for system in SYSTEMS:
        seconds, memory = measure(system, options.tokens, options.rounds)
        for tokens in options.tokens:
            cells = [str(system), str(tokens)]
            for mode in ("published", "throughout"):
                pairs = zip(seconds[tokens, "base"], seconds[tokens, mode], strict=True)
                speed = spread([base / own for base, own in pairs])
                cells.append(f"{speed.median:.3f} ({speed.low:.3f} to {speed.high:.3f})")
            cells.append(f"{memory['routed'] / memory['base']:.3f}")
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "```json", json.dumps(machine.describe(), indent=1), "```", ""]
    page = "\n".join(lines)
    RESULTS.write_text(page)
    Console().print(page, markup=False)


def measure(
    system: int, lengths: list[int], rounds: int
) -> tuple[dict[tuple[int, str], list[float]], dict[str, float]]:
    """Seconds of each round by (tokens, mode), and median of the resident bytes by engine."""
    context = multiprocessing.get_context("spawn")
    links, processes = {}, []
    for name, additional in ENGINES.items():
        links[name], theirs = context.Pipe()
        asked = theirs, additional, SYSTEMS[system]
        processes.append(context.Process(target=engine, args=asked))
        processes[-1].start()
        theirs.close()
    for name in tqdm(links, "engines start", leave=False):
        links[name].recv()
    seconds = defaultdict(list)
    memory: dict[str, list[float]] = {name: [] for name in ENGINES}
    # the shortest once more, before all, warms up
    runs = [min(lengths), *lengths * rounds]
    for i, tokens in enumerate(tqdm(runs, f"{system} tokens before the questions", leave=False)):
        for j, (mode, (name, extra)) in enumerate(MODES.items()):
            links[name].send((i * len(MODES) + j, tokens, extra))  # questions of its own
            taken, resident = links[name].recv()
            if i:
                seconds[tokens, mode].append(taken)
                memory[name].append(resident)
    for link, process in zip(links.values(), processes, strict=True):
        link.send(None)
        process.join()
    return seconds, {name: statistics.median(own) for name, own in memory.items()}


if __name__ == "__main__":
    main()
