"""The published decoding procedure (section 3.3): two models, no cache for the routed tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def mogu_generate(
    routed_model,
    base_model,
    input_ids: Tensor,
    max_new_tokens: int,
    eos_token_ids: Sequence[int] = (),
    routed_tokens: int = 5,
) -> Tensor:
    """Greedy: the first tokens from the routed model, the rest from the base model.

    Args:
        routed_model: a causal language model with routed projections.
        base_model: the same model without.
        input_ids: [1, tokens], int64.
        max_new_tokens: in all.
        eos_token_ids: tokens that end the answer.
        routed_tokens: 5 as published.

    Returns:
        [1, tokens + new tokens].
    """
    sequence = input_ids
    for _ in range(min(routed_tokens, max_new_tokens)):
        logits = routed_model(input_ids=sequence, use_cache=False).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        sequence = torch.cat([sequence, token], dim=1)
        if token.item() in eos_token_ids:
            return sequence
    left = max_new_tokens - (sequence.shape[1] - input_ids.shape[1])
    if left <= 0:
        return sequence
    return base_model.generate(
        sequence,
        attention_mask=torch.ones_like(sequence),
        max_new_tokens=left,
        do_sample=False,
        # what a model's own generation config may hold: greedy means the plain argmax
        num_beams=1,
        repetition_penalty=1.0,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=eos_token_ids[0] if eos_token_ids else 0,
    )
