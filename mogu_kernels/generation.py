"""Routed decoding: the first tokens from the routed model, the rest from the base model."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mogu_kernels.handoff import HANDOFFS, Sequences
from mogu_kernels.state import routed_state

_UNSUPPORTED = {
    "num_beams": "beam search",
    "num_beam_groups": "beam search",
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "assisted decoding",
    "penalty_alpha": "contrastive search",
    "dola_layers": "contrasting layers",
    "guidance_scale": "guidance by a second prompt",
    "negative_prompt_ids": "guidance by a second prompt",
    "prefill_chunk_size": "a prefill in chunks",
    "return_dict_in_generate": "a dictionary of outputs",
    "inputs_embeds": "a prompt of embeddings",
    "token_type_ids": "a type for every token",
}
_NEUTRAL = ("num_beams", "num_beam_groups", "guidance_scale")  # 1 asks for nothing


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Tensor | None = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    synced_gpus: bool = False,
    streamer: Any = None,
    *,
    routed_tokens: int | Literal["checkpoint"] | None = "checkpoint",
    handoff: Literal["shadow", "replay", "keep"] = "shadow",
    routed: Tensor | None = None,
    token_streamer: Any = None,
    tokenizer: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Generate with an attached model: `routed_tokens` routed, then the base model goes on.

    At the hand-over the published base model reads the prompt and the routed tokens afresh; both
    parts use a KV cache here, and one copy of the weights serves both. It is also a decoding method
    for transformers: `model.generate(..., custom_generate=mk.generate)`.

    Args:
        model: a Hugging Face causal language model with routed projections.
        input_ids: [batch, tokens], left-padded where prompts are unequal. Every token counts,
            unless `attention_mask` says otherwise.
        logits_processor: besides those that the generation config asks for.
        stopping_criteria: likewise.
        generation_config: instead of the model's.
        synced_gpus: not supported.
        streamer: gets the tokens as they come. Transformers keeps it from a `custom_generate`
            function: there, give `token_streamer`.
        routed_tokens: m; what the checkpoint says (5 as published); None routes every token.
        handoff: "shadow": the base model's cache is built while the routed tokens are produced.
            "replay": it is built at once, between two tokens, as published. Both give the same
            tokens. "keep": the routed cache is kept, an approximation.
        routed: bool [batch]; a False sequence is answered by the base model alone. What an open
            `mk.routing` context says if None.
        token_streamer: see `streamer`.
        tokenizer: for `stop_strings`.
        **kwargs: to the model's own `generate`: max_new_tokens, sampling, caches. An empty
            `past_key_values` is used, and holds neither model's tokens afterwards.

    Returns:
        [batch * num_return_sequences, tokens + new tokens], padded on the right where a sequence
        ended early.

    Raises:
        ValueError: an unknown hand-over, a number of tokens below zero, something that routed
            decoding does not support, or no routed projection in the model.
        TypeError: a mask that is not bool, a number of tokens that is no int.

    Source: MoGU, arXiv 2405.14488, section 3.3.
    """
    state = routed_state(model)
    if handoff not in HANDOFFS:
        raise ValueError(f"handoff={handoff!r}: take one of {', '.join(HANDOFFS)}")
    if routed_tokens == "checkpoint":
        routed_tokens = state.routed_tokens
    if routed_tokens is not None and type(routed_tokens) is not int:
        raise TypeError(f"routed_tokens={routed_tokens!r}: take an int, or None for all")
    if routed_tokens is not None and routed_tokens < 0:
        raise ValueError(f"routed_tokens={routed_tokens}: take 0 or more, or None for all")
    for key, what in _UNSUPPORTED.items():
        value = kwargs.get(key, getattr(generation_config, key, None))
        if value is None or value is False or (key in _NEUTRAL and value == 1):
            continue
        given = "given" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{key}={given}: {what} is not supported with routed tokens")
    if input_ids is not None and input_ids.ndim != 2:
        raise ValueError(f"input_ids is {list(input_ids.shape)}: take [batch, tokens]")
    if model.training and getattr(model, "is_gradient_checkpointing", False):
        raise ValueError("gradient checkpointing keeps no cache in training: call model.eval()")
    if synced_gpus:
        raise ValueError("synced_gpus=True is not supported: gather the parameters first")
    own = {"routed_tokens": routed_tokens, "handoff": handoff, "routed": routed}
    if not hasattr(generation_config, "_eos_token_tensor"):  # transformers prepares all, calls us
        prepare: Any = model.generate
        if input_ids is not None and kwargs.get("attention_mask") is None:
            # transformers would guess one from padding tokens, which chat templates use otherwise
            kwargs["attention_mask"] = torch.ones_like(input_ids)
        if tokenizer is not None and (strings := kwargs.pop("stop_strings", None)):
            stopping_criteria = [*(stopping_criteria or ()), _stop_at(tokenizer, strings)]
        return prepare(
            input_ids,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            custom_generate=generate,
            token_streamer=token_streamer if streamer is None else streamer,
            **own,
            **kwargs,
        )
    assert input_ids is not None
    copies = generation_config.num_return_sequences or 1
    mask = state.sequences if routed is None else routed
    enabled = state.enabled if mask is None else _row_mask(mask, input_ids, copies)
    return _decode(
        model, input_ids, logits_processor, stopping_criteria, generation_config, token_streamer,
        enabled, routed_tokens, handoff, kwargs,
    )  # fmt: skip


def _decode(
    model, input_ids, process, stop, config, streamer, enabled, routed_tokens, handoff, kwargs
) -> Tensor:
    """The loop: logits of a hand-over in, one token of every sequence out."""
    longest = stop.max_length - input_ids.shape[1]
    if routed_tokens is not None and routed_tokens >= longest:
        routed_tokens = None  # there is no hand-over
    sequences = Sequences(input_ids, kwargs)
    passes = HANDOFFS[handoff](model, sequences, enabled, routed_tokens)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stop)
    going = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    while going.any():
        scores = process(sequences.ids, passes.next_logits().to(input_ids.device))
        if config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        else:
            tokens = scores.argmax(-1)
        if ends:
            tokens = torch.where(going, tokens, config._pad_token_tensor.to(tokens.device))
        sequences.append(tokens)
        if streamer is not None:
            streamer.put(tokens.cpu())
        going &= ~stop(sequences.ids, None)
    if streamer is not None:
        streamer.end()
    return sequences.ids


def _row_mask(mask: Tensor, input_ids: Tensor, copies: int) -> Tensor:
    """Which rows are routed, repeated where a prompt has several answers."""
    if mask.dtype != torch.bool:
        raise TypeError(f"routed is {mask.dtype}: take a bool mask, one entry a sequence")
    rows = len(input_ids)
    if mask.ndim == 1 and len(mask) == rows:
        return mask.to(input_ids.device)
    if mask.ndim != 1 or len(mask) * copies != rows:
        raise ValueError(f"routed is {list(mask.shape)}, but there are {rows // copies} sequences")
    return mask.to(input_ids.device).repeat_interleave(copies)


def _stop_at(tokenizer: Any, strings: Any) -> Any:
    """Transformers' criterion, which it would not give a tokenizer when it calls us."""
    from transformers import StopStringCriteria

    return StopStringCriteria(tokenizer, strings)
