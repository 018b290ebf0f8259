"""A language model under a defence, as it is measured: answers, and how likely it finds given ones.

`System` is a model without a defence. The others change one step of it each: what the prompt is
(`prompts`), what generates (`RoutedSystem`), how two rows mix (`pairs`), who has the last word
(`judges`).
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mogu_kernels.evaluation import prompts
from mogu_kernels.generation import generate
from mogu_kernels.state import record_gates, routed_state, routing

ANSWER_TOKENS = 8192  # of one batch of answers, prompts and padding included
RESPONSE_TOKENS = 2048  # of one batch of given responses, whose logits are kept


class System:
    """A model without a defence.

    Args:
        model: a Hugging Face causal language model in eval mode.
        tokenizer: its own.
        prompt: what makes token ids of an instruction.
    """

    def __init__(self, model: Any, tokenizer: Any, prompt: prompts.Prompt = prompts.chat):
        self.model, self.tokenizer, self.prompt = model, tokenizer, prompt

    @torch.no_grad()
    def answers(
        self,
        instructions: Sequence[str],
        max_new_tokens: int = 32,
        *,
        sample: bool = False,
        seed: int = 0,
        batch_tokens: int = ANSWER_TOKENS,
    ) -> list[str]:
        """Answer every instruction.

        Args:
            instructions: user's turns.
            max_new_tokens: of one answer.
            sample: draw tokens at temperature 1, not greedily.
            seed: of the draws; the caller's generator is left as it was.
            batch_tokens: at most so many in a batch, unless one instruction alone has more.
        """
        rows = [self.rows(instruction) for instruction in instructions]
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sample}
        if sample:
            options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        answers = [""] * len(rows)
        bar = tqdm(total=len(rows), desc="answers", disable=None, leave=False)
        with bar, torch.random.fork_rng():
            torch.manual_seed(seed)
            for batch in batches(rows, max_new_tokens, batch_tokens):
                ids, mask = self.padded([row for i in batch for row in rows[i]])
                pad = self.pad_token_id
                out = self.generate(ids, mask, pad_token_id=pad, **options)
                new = out[:: len(rows[batch[0]]), ids.shape[1] :]
                texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
                for i, text in zip(batch, texts, strict=True):
                    answers[i] = text
                bar.update(len(batch))
        return answers

    @torch.no_grad()
    def response_nll(
        self,
        examples: Sequence[Any],
        *,
        max_response_tokens: int = 64,
        batch_tokens: int = RESPONSE_TOKENS,
    ) -> tuple[float, int] | None:
        """How unlikely the examples' responses are, given their instructions.

        Args:
            examples: with `instruction` and `response`.
            max_response_tokens: the beginning that counts.
            batch_tokens: as in `answers`.

        Returns:
            (sum of negative log-likelihoods in nats, tokens); None from a system that gives most
            tokens no probability at all.
        """
        prompted = [self.rows(example.instruction) for example in examples]
        responses = [self.response_ids(e.response)[:max_response_tokens] for e in examples]
        nats, tokens = 0.0, 0
        bar = tqdm(total=len(prompted), desc="responses", disable=None, leave=False)
        with bar:
            for batch in batches(prompted, max_response_tokens, batch_tokens):
                rows = [row + responses[i] for i in batch for row in prompted[i]]
                ids, mask = self.padded(rows)
                copies = len(prompted[batch[0]])
                lengths = torch.tensor([len(responses[i]) for i in batch], device=ids.device)
                kept = int(lengths.max())
                if kept:
                    logits = self.response_logits(ids, mask, lengths.repeat_interleave(copies))
                    # the responses end where the rows do, since padding is on the left
                    step = torch.arange(kept, device=ids.device) - (kept - lengths[:, None])
                    labels = ids[::copies, -kept:].masked_fill(step < 0, -100)
                    loss = F.cross_entropy(
                        logits[::copies].transpose(1, 2), labels, reduction="sum"
                    )
                    nats, tokens = nats + float(loss), tokens + int(lengths.sum())
                bar.update(len(batch))
        return nats, tokens

    def rows(self, instruction: str) -> list[list[int]]:
        """The rows of token ids that give one answer: one prompt here."""
        return [self.prompt(self.tokenizer, instruction)]

    def response_ids(self, response: str) -> list[int]:
        """Token ids of a given response, its end among them."""
        return [*prompts.plain_ids(self.tokenizer, response), self.tokenizer.eos_token_id]

    def generate(self, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
        """Prompts and answers [rows, tokens] of left-padded prompts."""
        return self.model.generate(ids, attention_mask=mask, **options)

    def response_logits(self, ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        """Logits [rows, longest response, vocabulary] of the last tokens, of which `lengths` count.

        Args:
            ids: [rows, tokens], padded on the left.
            mask: likewise, of the attention.
            lengths: [rows], tokens of each response.
        """
        return self.last_logits(ids, mask, int(lengths.max()) + 1)[:, :-1]

    def last_logits(self, ids: Tensor, mask: Tensor, count: int) -> Tensor:
        """Logits [rows, count, vocabulary] at the last positions, fp32."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            logits_to_keep=count,
            use_cache=False,
        )
        return out.logits.float()

    def padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(token ids, attention mask), both [rows, tokens], padded on the left."""
        longest, device = max(map(len, rows)), self.model.device
        ids = [[self.pad_token_id] * (longest - len(row)) + list(row) for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    @property
    def pad_token_id(self) -> int:
        """Any token will do where nothing pays attention."""
        own = self.tokenizer.pad_token_id
        return own if own is not None else self.tokenizer.eos_token_id or 0


class RoutedSystem(System):
    """A model with a MoGU checkpoint attached: as it decodes, `routed_tokens` routed, then base.

    Args:
        model: with routed projections.
        tokenizer: its own.
        prompt: as in `System`.
        routed_tokens: what the checkpoint says; None routes every token.
        expert_names: in the checkpoint's order.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompt: prompts.Prompt = prompts.chat,
        *,
        routed_tokens: int | Literal["checkpoint"] | None = "checkpoint",
        expert_names: Sequence[str] = ("glad", "unwill"),
    ):
        super().__init__(model, tokenizer, prompt)
        own = routed_state(model).routed_tokens
        self.routed_tokens = own if routed_tokens == "checkpoint" else routed_tokens
        self.expert_names = tuple(expert_names)

    def throughout(self) -> "RoutedSystem":
        """The same with every token routed."""
        system = copy.copy(self)
        system.routed_tokens = None
        return system

    def generate(self, ids, mask, **options):
        """By routed decoding; in full batches a replay is cheaper than a shadow, same tokens."""
        options |= {"routed_tokens": self.routed_tokens, "handoff": "replay"}
        return generate(self.model, ids, attention_mask=mask, **options)

    def response_logits(self, ids, mask, lengths):
        """Each response's first tokens from the routed model, the rest from the base model."""
        kept = int(lengths.max())
        with routing(self.model, True):
            routed = super().response_logits(ids, mask, lengths)
        if self.routed_tokens is None or self.routed_tokens >= kept:
            return routed
        with routing(self.model, False):
            base = super().response_logits(ids, mask, lengths)
        step = torch.arange(kept, device=ids.device) - (kept - lengths[:, None])
        return torch.where((step < self.routed_tokens)[..., None], routed, base)

    @torch.no_grad()
    def prompt_gates(self, instructions: Sequence[str]) -> dict[str, Tensor]:
        """What the routers say to each prompt, as a mean over the routed modules.

        Returns:
            {"last token": [instructions, E], "whole prompt": the same, the mean over its tokens}.
        """
        rows = [self.rows(instruction) for instruction in instructions]
        last: dict[int, Tensor] = {}
        whole: dict[int, Tensor] = {}
        for batch in batches(rows, 0, RESPONSE_TOKENS):
            ids, mask = self.padded([row for i in batch for row in rows[i]])
            with record_gates(self.model) as gates, routing(self.model, True):
                self.last_logits(ids, mask, 1)
            mean = torch.stack([own.float() for own in gates.values()]).mean(0)
            weight = mask[..., None] / mask.sum(1)[:, None, None]
            last |= zip(batch, mean[:, -1].cpu(), strict=True)
            whole |= zip(batch, (mean * weight).sum(1).cpu(), strict=True)
        figures = {"last token": last, "whole prompt": whole}
        return {
            position: torch.stack([own[i] for i in range(len(rows))])
            for position, own in figures.items()
        }


def batches(
    rows: Sequence[Sequence[Sequence[int]]], new_tokens: int, batch_tokens: int
) -> Iterator[list[int]]:
    """Numbers of instructions, longest first, so that a batch holds prompts of like lengths.

    Args:
        rows: the token ids of each instruction's rows.
        new_tokens: that every row gets besides.
        batch_tokens: of a batch at most, padding included; one instruction always fits.
    """
    width = [max(map(len, own)) + new_tokens for own in rows]
    order = sorted(range(len(rows)), key=lambda i: -width[i])
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(rows[i]) * width[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
