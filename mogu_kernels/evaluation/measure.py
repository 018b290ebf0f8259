"""One system, every prompt set: counts, rates, perplexity, gates. Answers are counted, not kept."""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mogu_kernels.evaluation.refusal import is_refusal, wilson_interval
from mogu_kernels.evaluation.systems import RoutedSystem, System
from mogu_kernels.training.data import Example

GATE_PROMPTS = 50  # of each set
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def evaluate(
    system: System,
    sets: Mapping[str, Sequence[Example]],
    *,
    prefixes: tuple[Sequence[str], Sequence[str]],
    limit: int | None = None,
    max_new_tokens: int = 32,
    sample: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Refusal by set, perplexity of given responses, gates by class.

    Args:
        system: a model under a defence.
        sets: examples by name, each set of one class. Where a benign set has responses, the
            system's perplexity on them is measured.
        prefixes: the refusal keywords, (all, narrow). A malicious set is judged by all of them, a
            benign one by the narrow ones; both rates are reported.
        limit: prompts of each set, evenly spread over it; None takes all.
        max_new_tokens: of an answer.
        sample: draw answers at temperature 1, not greedily.
        seed: of the draws.

    Returns:
        What JSON holds: {"sets": {name: {"n", "malicious", "refused", "rate", "interval", "all",
        "narrow", "answers_sha256"}}, "perplexity": {"decoded" and, of a routed system,
        "routed throughout": {"nats", "tokens", "perplexity"}}, "gates": see `gate_statistics`,
        "expert_names"}. Perplexity is None where the system has none.

    Raises:
        ValueError: a set is empty or mixes classes.
    """
    sets = {name: spread(examples, limit) for name, examples in sets.items()}
    for name, examples in sets.items():
        if len({example.malicious for example in examples}) != 1:
            raise ValueError(f"set {name!r} has no prompts or both classes: take one class a set")
    everything = [example for examples in sets.values() for example in examples]
    instructions = [example.instruction for example in everything]
    # one call, so that batches are full: the order of the answers is that of the sets
    answers = iter(system.answers(instructions, max_new_tokens, sample=sample, seed=seed))
    found: dict[str, Any] = {
        "sets": {
            name: _refusals(
                list(itertools.islice(answers, len(examples))), examples[0].malicious, prefixes
            )
            for name, examples in sets.items()
        },
        "perplexity": _perplexities(
            system, [e for e in everything if not e.malicious and e.response]
        ),
    }
    if isinstance(system, RoutedSystem):
        found["expert_names"] = list(system.expert_names)
        found["gates"] = _gates(system, sets)
    return found


def spread(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """At most `limit` examples, evenly spread: sets are often sorted by category."""
    count = len(examples) if limit is None else min(limit, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


def gate_statistics(gates: Tensor, expert_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{expert: {"mean", "quantiles": {"0.05": ...}}} of gates [prompts, E]."""
    levels = torch.tensor(QUANTILES, dtype=gates.dtype)
    return {
        expert: {
            "mean": float(own.mean()),
            "quantiles": {
                str(q): float(value)
                for q, value in zip(QUANTILES, torch.quantile(own, levels), strict=True)
            },
        }
        for expert, own in zip(expert_names, gates.T, strict=True)
    }


def _refusals(
    answers: Sequence[str], malicious: bool, prefixes: tuple[Sequence[str], Sequence[str]]
) -> dict[str, Any]:
    """Counts by both lists, and which of them counts for this class."""
    every, narrow = (sum(is_refusal(answer, own) for answer in answers) for own in prefixes)
    refused, n = every if malicious else narrow, len(answers)
    digest = hashlib.sha256(json.dumps(list(answers)).encode())
    return {
        "n": n,
        "malicious": malicious,
        "refused": refused,
        "rate": refused / n,
        "interval": list(wilson_interval(refused, n)),
        "all": every / n,
        "narrow": narrow / n,
        "answers_sha256": digest.hexdigest(),
    }


def _perplexities(system: System, examples: Sequence[Example]) -> dict[str, Any] | None:
    """By the way the responses are read."""
    readings = {"decoded": system}
    if isinstance(system, RoutedSystem):
        readings["routed throughout"] = system.throughout()
    found = {}
    for reading, own in readings.items():
        measured = own.response_nll(examples) if examples else None
        if measured is None:
            return None
        nats, tokens = measured
        perplexity = math.exp(nats / tokens)
        found[reading] = {"nats": nats, "tokens": tokens, "perplexity": perplexity}
    return found


def _gates(system: RoutedSystem, sets: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
    """{class: {position: statistics, with "by_prompt": {position: [prompts][E]}}}."""
    found = {}
    for malicious, name in ((False, "benign"), (True, "malicious")):
        instructions = [
            example.instruction
            for own in sets.values()
            for example in spread(own, GATE_PROMPTS)
            if example.malicious is malicious
        ]
        if not instructions:
            continue
        gates = system.prompt_gates(instructions)
        found[name] = {
            position: gate_statistics(own, system.expert_names) for position, own in gates.items()
        }
        found[name]["by_prompt"] = {
            position: [[round(gate, 5) for gate in row] for row in own.tolist()]
            for position, own in gates.items()
        }
    return found
