"""Routed decoding: the first tokens from the routed model, the rest from the base model."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mogu_kernels.state import routing

_UNSUPPORTED = {
    "num_beams": "beam search",
    "assistant_model": "assisted decoding",
    "streamer": "streaming",
    "return_dict_in_generate": "a dictionary of outputs",
}


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int | None = None,
    routed_tokens: int | None = 5,
    handoff: str = "replay",
    generation_config=None,
    **kwargs,
) -> Tensor:
    """Generate with an attached model: `routed_tokens` routed, then the base model goes on.

    At the hand-over the base model reads the prompt and the routed tokens afresh, as published;
    both parts use a KV cache, and one copy of the weights serves both.

    Args:
        model: a Hugging Face causal language model with routed projections.
        input_ids: [batch, tokens], left-padded where prompts are unequal.
        attention_mask: [batch, tokens]; ones if None.
        max_new_tokens: in all; the generation config's if None.
        routed_tokens: m, 5 as published; None routes every token.
        handoff: "replay", the published procedure.
        generation_config: instead of the model's.
        **kwargs: to the model's own `generate`: sampling, stopping criteria, logits processors.

    Returns:
        [batch * num_return_sequences, tokens + new tokens], padded on the right where a sequence
        ended early.

    Raises:
        ValueError: an unknown hand-over, a number of tokens below zero, something that routed
            decoding does not support, or no routed projection in the model.

    Source: MoGU, arXiv 2405.14488, section 3.3.
    """
    if handoff != "replay":
        raise ValueError(f'handoff={handoff!r}: take "replay"')
    if routed_tokens is not None and routed_tokens < 0:
        raise ValueError(f"routed_tokens={routed_tokens}: take 0 or more, or None for all")
    config: Any = copy.deepcopy(generation_config or model.generation_config)
    config.update(**{key: value for key, value in kwargs.items() if hasattr(config, key)})
    for key, what in _UNSUPPORTED.items():
        value = kwargs.get(key, getattr(config, key, None))
        if value not in (None, False, 1):
            raise ValueError(f"{key}={value!r}: {what} is not supported with routed tokens")
    prompt = input_ids.shape[1]
    if max_new_tokens is None:
        max_new_tokens = int(config.max_new_tokens or (config.max_length or 20) - prompt)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: take at least 1")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    copies, kwargs["num_return_sequences"] = config.num_return_sequences or 1, 1
    if generation_config is not None:
        kwargs["generation_config"] = generation_config
    sequences = input_ids.repeat_interleave(copies, 0)
    attention_mask = attention_mask.repeat_interleave(copies, 0)
    first = max_new_tokens if routed_tokens is None else min(routed_tokens, max_new_tokens)

    if first:
        with routing(model, True):
            sequences = _continue(model, sequences, attention_mask, first, config, prompt, kwargs)
    ended = _ended(sequences[:, prompt:], config)
    if first == max_new_tokens or ended.all():
        return sequences
    with routing(model, False):
        going = ~ended
        rest = _continue(
            model,
            sequences[going],
            attention_mask[going],
            max_new_tokens - first,
            config,
            prompt,
            kwargs,
        )
    if not ended.any():
        return rest
    out = rest.new_full((len(sequences), rest.shape[1]), _pad_token(config))
    out[:, : sequences.shape[1]] = sequences
    out[going] = rest
    return out


def _continue(model: Any, sequences, attention_mask, new_tokens, config, prompt, kwargs) -> Tensor:
    """The model's own `generate`, from a fresh prefill of prompt and answer so far."""
    done = sequences.shape[1] - prompt
    own = {"max_new_tokens": new_tokens, "pad_token_id": _pad_token(config)}
    if config.min_new_tokens is not None:
        own["min_new_tokens"] = max(0, config.min_new_tokens - done)
    mask = torch.cat([attention_mask, attention_mask.new_ones(len(sequences), done)], 1)
    return model.generate(sequences, attention_mask=mask, **kwargs | own)


def _ended(answers: Tensor, config) -> Tensor:
    """Which answers [batch, tokens] hold an end-of-sequence token, bool [batch]."""
    eos = config.eos_token_id
    if eos is None:
        return torch.zeros(len(answers), dtype=torch.bool, device=answers.device)
    eos = torch.as_tensor(eos, device=answers.device).view(-1)
    return torch.isin(answers, eos).any(1)


def _pad_token(config) -> int:
    """The padding token, or the first end-of-sequence token where the model has none."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    eos = config.eos_token_id
    return 0 if eos is None else eos if isinstance(eos, int) else eos[0]
