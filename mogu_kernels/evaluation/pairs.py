"""Defences that mix the next-token scores of two rows: SafeDecoding and ROSE.

Both rows of a sequence stand in one batch, (2i, 2i + 1), and share one copy of the weights. A
processor mixes their scores and gives both the same, so that both go on with the same token.
"""

from typing import Any

import torch
from torch import Tensor

from mogu_kernels.checkpoint import MoGUCheckpoint
from mogu_kernels.evaluation import prompts
from mogu_kernels.evaluation.systems import System
from mogu_kernels.state import routing

SATURATED = 40.0  # a gate's bias: its sigmoid is 1 in fp32


class Pairs:
    """Mix the scores of rows 2i and 2i + 1; subclasses say how.

    A logits processor by its call, which is all that transformers asks for.

    Args:
        sample: draw the token here, once for both rows, rather than let each draw its own.
    """

    def __init__(self, sample: bool = False):
        self.sample = sample

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [rows, vocabulary], equal in both rows of a pair."""
        mixed = self.mix(input_ids.shape[1], scores[0::2], scores[1::2])
        if self.sample:
            token = torch.multinomial(mixed.softmax(-1), 1)
            mixed = torch.full_like(mixed, -torch.inf).scatter(1, token, 0.0)
        return mixed.repeat_interleave(2, 0)

    def mix(self, tokens: int, first: Tensor, second: Tensor) -> Tensor:
        """Scores [sequences, vocabulary] of the token at place `tokens`, from both rows' own."""
        raise NotImplementedError


class SafeDecoding(Pairs):
    """Lean towards an expert in safety for the first tokens; the base goes on alone.

    The sample space is the smallest intersection of both models' top k that has `space` tokens; on
    it p = p_base + alpha * (p_expert - p_base), negative ones cut off, sums to one again.

    Args:
        prompt_tokens: how many tokens an answer begins after.
        alpha: the published 3.
        tokens: of an answer that are mixed, the published 2.
        space: the least size of the sample space, the published 5.
        sample: as in `Pairs`.

    Source: arXiv 2402.08983.
    """

    def __init__(
        self,
        prompt_tokens: int,
        *,
        alpha: float = 3.0,
        tokens: int = 2,
        space: int = 5,
        sample: bool = False,
    ):
        super().__init__(sample)
        self.prompt_tokens, self.alpha = prompt_tokens, alpha
        self.tokens, self.space = tokens, space

    def mix(self, tokens, first, second):
        """Base rows first, expert rows second."""
        if tokens - self.prompt_tokens >= self.tokens:
            return first
        # a token is in both top k where its worse place is below k
        worse = torch.maximum(places(first), places(second))
        inside = worse <= worse.kthvalue(min(self.space, worse.shape[1]))[0][:, None]
        base, expert = first.softmax(-1), second.softmax(-1)
        mixed = (base + self.alpha * (expert - base)).clamp(min=0) * inside
        # where the expert gives all of them less, nothing is left: then it is followed alone
        some = mixed.sum(-1, keepdim=True) > 0
        return torch.where(some, mixed, expert * inside).log().log_softmax(-1)


class ROSE(Pairs):
    """Take away what a prompt that asks for the opposite would have said.

    Args:
        alpha: how much of the reverse prompt's logits.
        sample: as in `Pairs`.

    Source: arXiv 2402.11889.
    """

    def __init__(self, alpha: float = 0.5, sample: bool = False):
        super().__init__(sample)
        self.alpha = alpha

    def mix(self, tokens, first, second):
        """Rows of the usual prompt first, of the reverse prompt second."""
        return first - self.alpha * second


class SafeDecodingSystem(System):
    """A base model and its expert in one model: the expert's rows of a batch are routed.

    Args:
        model: with `saturated(expert)` attached.
        tokenizer: its own.
        **options: of `SafeDecoding`.
    """

    def __init__(self, model: Any, tokenizer: Any, **options: Any):
        super().__init__(model, tokenizer)
        self.options = options

    def rows(self, instruction):
        """The same prompt for the base model and for the expert."""
        return super().rows(instruction) * 2

    def generate(self, ids, mask, **options):
        """Expert rows routed, the mixture for the first tokens."""
        mixing = SafeDecoding(ids.shape[1], sample=options["do_sample"], **self.options)
        with routing(self.model, expert_rows(ids)):
            return super().generate(ids, mask, logits_processor=[mixing], **options)

    def response_nll(self, *args, **kwargs):
        """None: outside the sample space every token has probability zero."""
        return None


class ROSESystem(System):
    """A model that is read under its usual and under a reverse system prompt.

    Args:
        model: as in `System`.
        tokenizer: its own.
        reverse: what makes the reverse prompt.
        alpha: of `ROSE`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        reverse: prompts.Prompt = prompts.reversed_system,
        alpha: float = 0.5,
    ):
        super().__init__(model, tokenizer)
        self.reverse, self.alpha = reverse, alpha

    def rows(self, instruction):
        """The prompt and the reverse prompt."""
        return [*super().rows(instruction), self.reverse(self.tokenizer, instruction)]

    def generate(self, ids, mask, **options):
        """By contrast."""
        contrast = ROSE(self.alpha, sample=options["do_sample"])
        return super().generate(ids, mask, logits_processor=[contrast], **options)

    def response_logits(self, ids, mask, lengths):
        """The contrast of both rows, in both."""
        logits = super().response_logits(ids, mask, lengths)
        return ROSE(self.alpha).mix(0, logits[0::2], logits[1::2]).repeat_interleave(2, 0)


def places(scores: Tensor) -> Tensor:
    """Each token's place in the order of its row's scores, 0 the best; int64, shaped alike."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    own = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, own)


def expert_rows(ids: Tensor) -> Tensor:
    """The mask bool [rows] of the second row of every pair."""
    return torch.arange(len(ids), device=ids.device) % 2 == 1


def saturated(expert: MoGUCheckpoint) -> MoGUCheckpoint:
    """A checkpoint of one expert, as `from_peft` makes it, whose gate is always 1: plain LoRA."""
    if expert.config.num_experts != 1:
        raise ValueError(f"the checkpoint has {expert.config.num_experts} experts: take one")
    for name, tensor in expert.tensors.items():
        if name.endswith(".gate_bias"):
            tensor.fill_(SATURATED)
    return expert
