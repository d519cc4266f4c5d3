"""Rows of tokens as the model takes them: one example padded, or several packed side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .tokens import Tokens

Row = tuple[Tokens, ...]
"""The examples of one row of a batch."""


@dataclass(frozen=True)
class Batch:
    """One forward pass."""

    ids: Tensor
    """(rows, length) of int64, padded on the right"""
    learnt: Tensor
    """(rows, length) of bool: which tokens are to be predicted, from all before them in their example"""
    mask: Tensor
    """Attention: (rows, length) of int64, 0 for padding; packed, (rows, 1, length, length), added to the scores"""
    positions: Tensor | None
    """(rows, length), from 0 in each example; None where rows are single examples"""

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """The keyword arguments of a causal language model."""
        given = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}
        return {name: tensor.to(device) for name, tensor in given.items() if tensor is not None}


def single(examples: Sequence[Tokens]) -> list[Row]:
    """An example a row."""
    return [(example,) for example in examples]


def pack(examples: Sequence[Tokens], length: int) -> list[Row]:
    """Examples into as few rows of at most `length` tokens as the longest-first rule finds; their order is kept."""
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(examples)), key=lambda i: -len(examples[i].ids)):
        size = len(examples[index].ids)
        place = next((row for row, left in enumerate(free) if left >= size), None)
        if place is None:
            rows.append([])
            free.append(length)
            place = len(rows) - 1
        rows[place].append(index)
        free[place] -= size
    return [tuple(examples[index] for index in sorted(row)) for row in sorted(rows, key=min)]


def collate(rows: Sequence[Row], packed: bool, dtype: torch.dtype) -> Batch:
    """A batch of rows. `dtype` is the attention scores', for the mask of packed rows."""
    length = max(sum(len(example.ids) for example in row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    learnt = torch.zeros(len(rows), length, dtype=torch.bool)
    owner = torch.full((len(rows), length), -1)
    positions = torch.zeros(len(rows), length, dtype=torch.int64)
    for r, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row):
            span = slice(start, start + len(example.ids))
            ids[r, span] = torch.tensor(example.ids)
            learnt[r, span] = torch.tensor(example.learnt)
            owner[r, span] = number
            positions[r, span] = torch.arange(len(example.ids))
            start = span.stop
    if not packed:
        return Batch(ids, learnt, (owner >= 0).long(), None)
    return Batch(ids, learnt, _block_diagonal(owner, dtype), positions)


def _block_diagonal(owner: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, 1, length, length): 0 where a token may look, the lowest number where it may not.

    A mask of our own rather than positions alone: every model of transformers takes it with its eager and its sdpa
    attention, and none has to guess where an example begins. Padding looks at padding, so that no row is empty.
    """
    same = owner[:, :, None] == owner[:, None, :]
    earlier = torch.ones(owner.shape[1], owner.shape[1], dtype=torch.bool).tril()
    hidden = ~(same & earlier)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min).unsqueeze(1)
