"""Prompts with their answers as one packed batch: what they have in common is computed once.

A chat template begins every prompt alike, and a pair has two answers to one prompt. So a batch is
a tree: the common beginning, the prompts, the answers. Its tokens lie one after another in a row,
without padding between; a mask lets each see its own branch only, and position ids go on from the
branch's parent, so the logits are those of the sequences apart.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = -100  # a label that the cross entropy leaves out
ROW_TOKENS = 1024  # a row is not filled further; attention costs the square of its length


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt with its answers, token ids.

    Attributes:
        prompt: ends where an answer begins.
        answers: at least one, none empty.
        malicious: the class of the prompt.
    """

    prompt: list[int]
    answers: list[list[int]]
    malicious: bool


@dataclasses.dataclass(frozen=True)
class Packer:
    """Lists of items (of which a trainer's batch has several) to tensors.

    A *sequence* is a prompt with one of its answers; sequences are counted in order, S in all.

    Batch: `input_ids` and `position_ids` [R, T]; `attention_mask` [R, 1, T, T], to be added to the
    scores; `columns` [C], those with a logit that is needed; `labels` [S, L] and `places` [S, L],
    where a label's logit is in [R, C] flattened; `tokens` [S, R, T], whether a token is of a
    sequence; `malicious` float [S].

    Args:
        pad_token_id: fills the shorter rows.
        dtype: of the mask.
    """

    pad_token_id: int
    dtype: torch.dtype = torch.float32

    def __call__(self, groups: Sequence[Sequence[Item]]) -> dict[str, Tensor]:
        """See the class."""
        items = [item for group in groups for item in group]
        common = _common([item.prompt[:-1] for item in items])
        rows = [_Row(common)]
        for item in items:
            size = len(item.prompt) - len(common) + sum(map(len, item.answers))
            if len(rows[-1].ids) + size > ROW_TOKENS and rows[-1].sequences:
                rows.append(_Row(common))
            rows[-1].add(item, len(common))
        R, T = len(rows), max(len(row.ids) for row in rows)
        columns = sorted({c for row in rows for s in row.sequences for c in s.sources})
        S = sum(len(row.sequences) for row in rows)
        L = max(len(s.sources) for row in rows for s in row.sequences)
        ids = torch.full((R, T), self.pad_token_id)
        positions = torch.zeros(R, T, dtype=torch.long)
        sees = torch.eye(T, dtype=torch.bool).repeat(R, 1, 1)  # padding sees itself
        labels, places = torch.full((S, L), IGNORED), torch.zeros(S, L, dtype=torch.long)
        tokens = torch.zeros(S, R, T, dtype=torch.bool)
        index, number = {column: i for i, column in enumerate(columns)}, 0
        for r, row in enumerate(rows):
            ids[r, : len(row.ids)] = torch.tensor(row.ids)
            positions[r, : len(row.ids)] = torch.tensor(row.positions)
            for own in row.sequences:
                branch = torch.tensor(own.branch)
                sees[r, branch[:, None], branch] = branch[:, None] >= branch
                answer = branch[-len(own.sources) :]
                labels[number, : len(answer)] = ids[r, answer]
                places[number, : len(answer)] = torch.tensor(
                    [r * len(columns) + index[column] for column in own.sources]
                )
                tokens[number, r, branch] = True
                number += 1
        mask = torch.zeros(R, 1, T, T, dtype=self.dtype)
        mask.masked_fill_(~sees[:, None], torch.finfo(self.dtype).min)
        malicious = [s.malicious for row in rows for s in row.sequences]
        return {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": mask,
            "columns": torch.tensor(columns),
            "labels": labels,
            "places": places,
            "tokens": tokens,
            "malicious": torch.tensor(malicious, dtype=torch.float32),
        }


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """Columns of a sequence's tokens in order, and of those whose logits foretell its answer."""

    branch: list[int]
    sources: list[int]
    malicious: bool


class _Row:
    """Tokens of one row, with the sequences in it."""

    def __init__(self, common: list[int]):
        self.ids, self.positions = list(common), list(range(len(common)))
        self.sequences: list[_Sequence] = []

    def add(self, item: Item, common: int) -> None:
        """Append a prompt, without its first `common` tokens, and its answers."""
        prompt = [*range(common), *self._append(item.prompt[common:], common)]
        if not all(item.answers):
            raise ValueError("an answer without tokens: allow it at least one")
        for answer in item.answers:
            columns = self._append(answer, len(item.prompt))
            sources = [prompt[-1], *columns[:-1]]
            self.sequences.append(_Sequence(prompt + columns, sources, item.malicious))

    def _append(self, ids: list[int], position: int) -> list[int]:
        """The columns of more tokens, the first of them at `position` of its sequence."""
        columns = [*range(len(self.ids), len(self.ids) + len(ids))]
        self.ids += ids
        self.positions += range(position, position + len(ids))
        return columns


def _common(sequences: list[list[int]]) -> list[int]:
    """What all begin with."""
    alike = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False))
    return [ids[0] for ids in alike]
