"""Examples as the token ids that the stages are trained on."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

from mogu_kernels.training.batches import Item
from mogu_kernels.training.data import Example, encode
from mogu_kernels.training.templates import OPENERS, REFUSALS


class Encoder:
    """A tokenizer with the limits and the template of a run.

    Args:
        tokenizer: of the model.
        max_prompt_tokens: see `data.encode`, as for the other two.
        max_response_tokens: likewise.
        template: likewise.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_prompt_tokens: int,
        max_response_tokens: int,
        template: str = "chat",
    ):
        """See the class."""
        self.tokenizer = tokenizer
        self.options: dict[str, Any] = {
            "max_prompt_tokens": max_prompt_tokens,
            "max_response_tokens": max_response_tokens,
            "template": template,
        }

    @property
    def pad_token_id(self) -> int:
        """What batches are padded with; it is masked, so the eos token serves as well."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def __call__(self, instruction: str, response: str) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the response."""
        return encode(self.tokenizer, instruction, response, **self.options)


def pairs(examples: Sequence[Example], encoder: Encoder, seed: int) -> list[list[Item]]:
    """Malicious prompts with (a refusal, an affirmative opener) each, for the responders.

    Args:
        examples: of both classes; the benign ones are left out, as published.
        encoder: of the run.
        seed: of the choice of sentences.
    """
    rng, items = random.Random(seed), []
    for example in examples:
        if example.malicious:
            prompt, rejection = encoder(example.instruction, rng.choice(REFUSALS))
            _, affirmation = encoder(example.instruction, rng.choice(OPENERS))
            items.append([Item(prompt, [rejection, affirmation], True)])
    return items


def couples(examples: Sequence[Example], encoder: Encoder, seed: int) -> list[list[Item]]:
    """One malicious prompt with a refusal and one benign prompt with its answer, for the routers.

    Both classes count alike: the smaller one is repeated until the larger is used up.

    Args:
        examples: of both classes; benign ones have a response.
        encoder: of the run.
        seed: of the order and of the choice of refusals.

    Raises:
        ValueError: a class without examples, or a benign example without a response.
    """
    rng = random.Random(seed)
    classes = [[e for e in examples if e.malicious], [e for e in examples if not e.malicious]]
    if not all(classes):
        raise ValueError(
            f"{len(classes[0])} malicious and {len(classes[1])} benign examples: give both, "
            "to train on and to validate"
        )
    for own in classes:
        rng.shuffle(own)
    size = max(map(len, classes))
    return [
        [_sample(example, encoder, rng) for example in couple]
        for couple in itertools.islice(zip(*map(itertools.cycle, classes), strict=True), size)
    ]


def _sample(example: Example, encoder: Encoder, rng: random.Random) -> Item:
    response = rng.choice(REFUSALS) if example.malicious else example.response
    if response is None:
        raise ValueError(f"{example.source}: a benign example without a response: add one")
    prompt, answer = encoder(example.instruction, response)
    return Item(prompt, [answer], example.malicious)
