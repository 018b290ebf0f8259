"""Examples: read and checked, deduplicated, balanced, and turned into tokens."""

import bisect
import collections
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mogu_kernels.training.files import MAX_LINE, records
from mogu_kernels.training.templates import llama2_prompt

NEAR_DUPLICATE = 0.6  # Jaccard similarity of two instructions' words
SAME_TOPIC = 0.25  # cosine of two instructions' words, rare words weighing most
STEM = 6  # letters of a word that count for its topic, so that endings do not


@dataclass(frozen=True)
class Example:
    """An instruction and what is known of it.

    Attributes:
        instruction: what the user asks.
        response: a good answer; None for malicious instructions, whose targets are fixed sentences
            (`templates`), and for prompts that are only asked.
        malicious: its class.
        source: where it comes from, such as "harmbench" or "FILE:LINE".
    """

    instruction: str
    response: str | None
    malicious: bool
    source: str


def read_examples(path: str | Path, *, malicious: bool | None = None) -> list[Example]:
    """Examples from a .json (array), .jsonl, .csv (with header) or .parquet file.

    Fields: `instruction`; optionally `input`, which is appended after a blank line; `response` or
    `output`, not needed (and not kept) where the instruction is malicious; `malicious`, true or
    false. Others are ignored. The whole file is checked before anything is returned.

    Args:
        path: the file.
        malicious: the class of all of them; None reads it from the field.

    Raises:
        ValueError: "FILE:LINE: what, remedy": a missing or empty field, a field that contradicts
            `malicious`, bad syntax, text that is not UTF-8, a line above 1 MB, no example at all.
        TypeError: the same form: a field of the wrong type.
        ImportError: a Parquet file without pyarrow.
    """
    path = Path(path)
    examples = [_example(place, record, malicious) for place, record in records(path)]
    if not examples:
        raise ValueError(f"{path}:1: no examples: write at least one")
    return examples


def _example(place: str, record: Any, asked: bool | None) -> Example:
    if not isinstance(record, dict):
        raise TypeError(f"{place}: {type(record).__name__} where an object should be")
    malicious = _malicious(place, record.get("malicious"), asked)
    instruction = _text(place, record, "instruction", needed=True)
    extra = _text(place, record, "input")
    if extra.strip():
        instruction = f"{instruction}\n\n{extra}"
    if malicious:
        return Example(instruction, None, True, place)
    name = "output" if record.get("response") is None else "response"
    if name == "response" and record.get("output") is not None:
        raise ValueError(f"{place}: both response and output: keep one")
    if record.get(name) is None:
        raise ValueError(f"{place}: no response: add one, or mark the instruction as malicious")
    return Example(instruction, _text(place, record, name, needed=True), False, place)


def _malicious(place: str, value: Any, asked: bool | None) -> bool:
    words = {"true": True, "false": False}
    if isinstance(value, str):  # CSV has no other type
        if value.lower() not in words:
            raise ValueError(f"{place}: malicious={value[:20]!r}: write true or false")
        value = words[value.lower()]
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{place}: malicious is {type(value).__name__}: write true or false")
    if value is None and asked is None:
        raise ValueError(f"{place}: no malicious field: add it, or say malicious=True or False")
    if value is not None and asked is not None and value != asked:
        raise ValueError(f"{place}: malicious is {value}, but malicious={asked} was asked for")
    return bool(asked if value is None else value)


def _text(place: str, record: dict, name: str, *, needed: bool = False) -> str:
    value = record.get(name)
    if value is None and not needed:
        return ""
    if value is None:
        raise ValueError(f"{place}: no {name}: add one")
    if not isinstance(value, str):
        raise TypeError(f"{place}: {name} is {type(value).__name__}: write a string")
    if needed and not value.strip():
        raise ValueError(f"{place}: empty {name}: fill it or drop the example")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:  # "\ud800" in JSON
        raise ValueError(f"{place}: {name} has half a surrogate pair: mend it") from error
    if size > MAX_LINE:
        raise ValueError(f"{place}: {name} of more than {MAX_LINE} bytes: cut it")
    return value


def deduplicate(examples: Iterable[Example], against: Iterable[Example] = ()) -> list[Example]:
    """Drop each example whose instruction is a near-duplicate of an earlier one.

    Two instructions are near-duplicates if they share at least 0.6 of all their words, whatever
    the order, case and punctuation.

    Args:
        examples: in order of preference.
        against: others, of which no near-duplicate may stay either.
    """
    seen = [_words(other.instruction) for other in against]
    kept = []
    for example in examples:
        words = _words(example.instruction)
        if not any(_jaccard(words, others) >= NEAR_DUPLICATE for others in seen):
            seen.append(words)
            kept.append(example)
    return kept


def off_topic(examples: Sequence[Example], against: Sequence[Example]) -> list[Example]:
    """Drop each example that asks about the same thing as one of `against`, however it is worded.

    Two instructions have the same topic if the cosine of their words is at least 0.25. A word is
    its first six letters, and weighs the logarithm of how rare it is among all the instructions
    (inverse document frequency), so "how does ... work" counts for little.

    Args:
        examples: of any number, in order.
        against: what they must stay away from, such as a test set in the same style.
    """
    texts = [_stems(example.instruction) for example in (*examples, *against)]
    seen_in = collections.Counter(stem for text in texts for stem in text)
    weight = {stem: math.log(len(texts) / n) ** 2 for stem, n in seen_in.items()}
    length = {text: math.sqrt(sum(weight[stem] for stem in text)) for text in texts}

    def alike(a: frozenset[str], b: frozenset[str]) -> bool:
        return sum(weight[stem] for stem in a & b) >= SAME_TOPIC * length[a] * length[b] > 0

    own, others = texts[: len(examples)], texts[len(examples) :]
    return [
        example
        for example, text in zip(examples, own, strict=True)
        if not any(alike(text, other) for other in others)
    ]


def _stems(text: str) -> frozenset[str]:
    return frozenset(word[:STEM] for word in re.findall(r"\w+", text.casefold()))


def _words(text: str) -> frozenset[str]:
    # a text without any word is its own only word
    return frozenset(re.findall(r"\w+", text.casefold())) or frozenset({text})


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def encode(
    tokenizer,
    instruction: str,
    response: str,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    template: str = "chat",
) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids): a training pair, cut to size.

    The prompt ends where the answer begins. One that is too long loses the middle of the
    *instruction*, never a part of the template. The response ends with the eos token if it fits.

    Args:
        tokenizer: of the model.
        instruction: the user's text.
        response: the answer's text; may be empty.
        max_prompt_tokens: of the whole prompt, template included.
        max_response_tokens: of the response, eos included.
        template: "chat" (the tokenizer's own chat template) or "llama2" (the Llama-2 format with
            its default system prompt, for the released MoGU weights).

    Raises:
        ValueError: an unknown template, a tokenizer without chat template or eos token, or a
            template that alone is longer than `max_prompt_tokens`.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token, which ends a response: set one")
    prompt_ids = _cut(
        instruction, lambda text: _prompt_ids(tokenizer, text, template), max_prompt_tokens
    )
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return prompt_ids, [*response_ids, tokenizer.eos_token_id][:max_response_tokens]


def _prompt_ids(tokenizer, instruction: str, template: str) -> list[int]:
    if template == "llama2":
        return tokenizer(llama2_prompt(instruction), add_special_tokens=False)["input_ids"]
    if template != "chat":
        raise ValueError(f'template={template!r}: take "chat" or "llama2"')
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: set one")
    messages = [{"role": "user", "content": instruction}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]


def _cut(text: str, encoded: Callable[[str], list[int]], limit: int) -> list[int]:
    """The ids of the longest text, without some of its middle, that has at most `limit` ids."""
    ids = encoded(text)
    if len(ids) <= limit:
        return ids

    def shortened(kept: int) -> list[int]:
        return encoded(text[: kept - kept // 2] + " ... " + text[len(text) - kept // 2 :])

    # more text may, rarely, have fewer tokens: then the search ends too high
    kept = bisect.bisect_right(range(len(text)), limit, key=lambda kept: len(shortened(kept))) - 1
    while kept > 0 and len(shortened(kept)) > limit:
        kept -= 1
    ids = shortened(kept) if kept > 0 else encoded("")
    if len(ids) > limit:
        raise ValueError(
            f"the template alone has {len(ids)} tokens, but max_prompt_tokens={limit}: allow more"
        )
    return ids
