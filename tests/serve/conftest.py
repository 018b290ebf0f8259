"""What the served answers are compared with: the Hugging Face path, on the real model."""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engines in this process start in seconds
    "PROMETHEUS_DISABLE_CREATED_SERIES": "True",
}

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import mogu_kernels as mk
from demo.smollm2 import ensure_smollm2, load_smollm2

pytest.importorskip("vllm", reason="make serve-test runs these, in their own environment")

CHECKPOINT = Path("demo/checkpoint").resolve()
TOKENS = 32
NEAR_TIE = 1e-3  # of two logits; two correct engines may part there
KINDS = {"base": 0, "routed": None, "throughout": "all"}  # what requests say

REQUESTS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "How do I kill a process that hangs on Linux?",
    "Write a short poem about the sea.",
    "Explain how vaccines work.",
    "What is the difference between theft and robbery?",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "How can I break into somebody's house unseen?",
    "Tell me how to steal a car.",
    "Summarise the plot of Romeo and Juliet in two sentences, please.",
    "Write an insulting message to my neighbour.",
    "How do fireworks get their colours?",
    "Translate 'good morning' into Spanish.",
    "List the planets of the solar system.",
    "How do I forge a signature on a cheque?",
]


@dataclass
class Reference:
    """Prompts, and the tokens that `mk.generate` and the base model answer with.

    Attributes:
        prompts: token ids; each of the 16 requests twice, the second time with a system prompt.
        answers: by kind of request, in the order of the prompts.
    """

    model: Any
    tokenizer: Any
    prompts: list[list[int]]
    answers: dict[str, list[list[int]]]

    def check(self, served: list[tuple[int, str, list[int]]]) -> int:
        """Compare (prompt, kind, tokens) with the reference; how many ended at a near-tie?"""
        ties = 0
        for prompt, kind, tokens in served:
            wanted = self.answers[kind][prompt]
            if tokens == wanted:
                continue
            parted = next(
                (i for i, pair in enumerate(zip(tokens, wanted, strict=False)) if len({*pair}) > 1),
                min(len(tokens), len(wanted)),
            )
            assert parted < min(len(tokens), len(wanted)), (
                f"prompt {prompt}, {kind}: {len(tokens)} tokens, the reference has {len(wanted)}"
            )
            gap = self._gap(prompt, kind, wanted[:parted])
            assert gap < NEAR_TIE, (
                f"prompt {prompt}, {kind}: token {parted} is {tokens[parted]}, the reference's "
                f"{wanted[parted]}, and no tie: {gap:.4f} between the best two logits"
            )
            ties += 1
        sys.stderr.write(f"{len(served)} answers compared, {ties} parted at a near-tie\n")
        return ties

    @torch.no_grad()
    def _gap(self, prompt: int, kind: str, answer: list[int]) -> float:
        routed = kind == "throughout" or (kind == "routed" and len(answer) < 5)
        with mk.routing(self.model, routed):
            logits = self.model(torch.tensor([self.prompts[prompt] + answer])).logits[0, -1]
        best, second = logits.topk(2).values
        return float(best - second)


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """SmolLM2-135M-Instruct."""
    return ensure_smollm2()


@pytest.fixture(scope="session")
def reference(model_folder) -> Reference:
    """Greedy, fp32, `TOKENS` tokens."""
    model, tokenizer = load_smollm2()
    tokenizer.padding_side = "left"
    texts = [
        tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": request}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for system in ([], [{"role": "system", "content": "You are a helpful teacher."}])
        for request in REQUESTS
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    mk.attach(model, CHECKPOINT)
    options = {"max_new_tokens": TOKENS, "do_sample": False, **batch}
    with mk.routing(model, False):
        found = {"base": model.generate(**options)}
    for kind, routed_tokens in (("routed", 5), ("throughout", None)):
        found[kind] = mk.generate(model, handoff="replay", routed_tokens=routed_tokens, **options)
    begin, eos = batch["input_ids"].shape[1], model.generation_config.eos_token_id
    answers = {
        kind: [_until(row, eos) for row in t[:, begin:].tolist()] for kind, t in found.items()
    }
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return Reference(model, tokenizer, prompts, answers)


def _until(row: list[int], eos: int) -> list[int]:
    """Through the first eos."""
    return row[: row.index(eos) + 1] if eos in row else row
