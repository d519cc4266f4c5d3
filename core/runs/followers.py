"""Followers of a run's events: files that keep them, a progress bar, TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from ..files import write_text
from .events import Evaluation, Event, Plan, Progress, Step


class EventFile:
    """Appends events of one kind as lines of JSON. Their steps increase, also across a kill and a rerun."""

    def __init__(self, path: Path, kind: type[Step] | type[Evaluation] = Step):
        self.path, self.kind = path, kind

    def truncate(self, step: int) -> None:
        """Drop what was written after `step`, and a line that a kill left half written."""
        if not self.path.exists():
            return
        lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_text(self.path, "".join(kept))

    def write(self, event: Event) -> None:
        if isinstance(event, self.kind):
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(event)) + "\n")


@dataclass
class ProgressBar:
    """Shows events on a terminal: a bar with loss, speed and time left, and a line for whatever else is worth one."""

    disable: bool = False
    _bar: tqdm | None = field(default=None, init=False)
    _stage: str | None = field(default=None, init=False)
    _loss: float | None = field(default=None, init=False)

    def follow(self, events: Iterable[Event]) -> Event | None:
        """Consume `events` to the end; the last one is returned (`Done` or `Stopped`)."""
        event = None
        try:
            for event in events:
                self.show(event)
        finally:
            self._close()
        return event

    def show(self, event: Event) -> None:
        said = event.line()
        if said is not None and not self.disable:
            tqdm.write(said)
        match event:
            case Progress(stage, done, total):
                bar = self._bar_of(stage, total, 0)
                bar.update(done - bar.n)
            case Plan():
                self._bar_of("training", event.max_train_steps, event.start_step)
            case Step():
                assert self._bar is not None
                self._loss = event.loss if self._loss is None else 0.95 * self._loss + 0.05 * event.loss
                self._bar.set_postfix(loss=f"{self._loss:.4f}", refresh=False)  # smoothed: one step tells nothing
                self._bar.update(event.step - self._bar.n)

    def _bar_of(self, stage: str, total: int, initial: int) -> tqdm:
        if self._bar is None or self._stage != stage:
            self._close()
            self._stage = stage
            self._bar = tqdm(total=total, initial=initial, desc=stage, disable=self.disable, dynamic_ncols=True)
        return self._bar

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
