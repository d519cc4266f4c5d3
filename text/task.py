"""What fine-tuning minimises: the mean cross-entropy of the tokens that are learnt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.runs.events import Evaluation
from ..core.runs.place import Place
from ..core.runs.random_state import shuffled
from .batches import Batch, Row, collate
from .config import TextConfig


class NextToken:
    """The task of a `Trainer`, and the same loss on held-out rows."""

    def __init__(
        self, config: TextConfig, model: nn.Module, rows: Sequence[Row], held_out: Sequence[Row], place: Place
    ):
        self.config, self.model, self.place = config, model, place
        self.rows, self.held_out = rows, held_out

    # ---------------------------------------------------------------- training

    def losses(self, batch_number: int) -> dict[str, Tensor]:
        """Of one batch, as its share of the step: the step's loss is the mean over all tokens that are learnt in it,
        however they are spread over batches and processes."""
        together = self.config.gradient_accumulation_steps * self.place.processes
        first = batch_number - batch_number % together
        count = sum(_count(self.draw(number)) for number in range(first, first + together))
        total = self.total(self.draw(batch_number))
        return {"loss": total * together / count}

    def draw(self, batch_number: int) -> list[Row]:
        """The rows of batch `batch_number` of the run."""
        size = self.config.train_batch_size
        order = shuffled(self.config.seed, "examples", len(self.rows), batch_number * size, size)
        return [self.rows[index] for index in order.tolist()]

    def data(self) -> dict[str, list[Any]]:
        return {"training": [[example.ids for example in row] for row in self.rows]}

    # ---------------------------------------------------------------- the loss

    def total(self, rows: Sequence[Row]) -> Tensor:
        """The summed cross-entropy of what is learnt in these rows, in nats and float32."""
        batch = self._collate(rows)
        logits = self.model(**batch.inputs(self.place.device), use_cache=False).logits[:, :-1]  # (rows, length, words)
        chosen = batch.learnt[:, 1:].to(logits.device)
        wanted = batch.ids[:, 1:].to(logits.device)
        return F.cross_entropy(logits[chosen].float(), wanted[chosen], reduction="sum")

    def _collate(self, rows: Sequence[Row]) -> Batch:
        return collate(rows, self.config.packing, next(self.model.parameters()).dtype)

    def evaluate(self, step: int) -> Evaluation:
        """The mean loss on what is held out. Leaves the training as it was: no dropout, no gradient, no random draw."""
        started = time.perf_counter()
        was_training = self.model.training
        self.model.eval()
        size = self.config.train_batch_size
        batches = [self.held_out[start : start + size] for start in range(0, len(self.held_out), size)]
        with torch.no_grad():
            total = torch.stack([self.total(rows) for rows in batches]).sum().item()
        self.model.train(was_training)
        count = _count(self.held_out)
        return Evaluation(step, total / count, count, time.perf_counter() - started)


def _count(rows: Sequence[Row]) -> int:
    """How many tokens are learnt in these rows."""
    return sum(sum(example.learnt) for row in rows for example in row)
