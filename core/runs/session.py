"""The training loop: step, look, save, until the end or until asked to stop."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from ..files import load_adapter
from .config import RunConfig
from .directory import RunDirectory
from .events import Checkpoint, Done, Event, Notice, Plan, Stopped
from .requests import Requests, taken
from .trainer import ADAPTER, Trainer, TrainingError

_STATE = "training.pt"


class Session(ABC):
    """One call of a run, from where its directory stands. A front end writes the abstract methods."""

    def __init__(self, directory: RunDirectory, trainer: Trainer, requests: Requests):
        self.directory, self.trainer, self.requests = directory, trainer, requests
        self.place = trainer.place
        self.started = time.perf_counter()

    # ---------------------------------------------------------------- what a front end writes

    @abstractmethod
    def plan(self, **known: Any) -> Plan:
        """What is told before the first step; `known` are the fields that every run has."""

    @abstractmethod
    def look_every(self) -> int:
        """Steps between looks at what is being learnt; 0 for one at the start and one at the end only."""

    @abstractmethod
    def look(self, step: int) -> Iterator[Event]:
        """Show what has been learnt after `step` steps: samples, a held-out loss. Must not disturb the training."""

    @abstractmethod
    def write_adapters(self, folder: Path, step: int) -> None:
        """Write the adapters of a checkpoint, each component's where `adapter_folder` looks for it."""

    @abstractmethod
    def adapter_folder(self, folder: Path, component: str) -> Path:
        """Where in a checkpoint the adapter of a component lies."""

    @abstractmethod
    def finish(self, step: int) -> Iterator[Event]:
        """Write the finished adapter into the run's directory."""

    # ---------------------------------------------------------------- the loop

    @property
    def config(self) -> RunConfig:
        return self.trainer.config

    def events(self) -> Iterator[Event]:
        done = yield from self._resume()
        if self.place.on_cuda:
            torch.cuda.reset_peak_memory_stats(self.place.device)
        yield self._plan(done)
        if done == 0:
            yield from self._look(0)
        try:
            for step in range(done + 1, self.config.max_train_steps + 1):
                yield self.trainer.step(step)
                last, stopping = step == self.config.max_train_steps, self._stopping()
                if taken(self.requests.sample) or last or self._looking(step):
                    yield from self._look(step)
                if taken(self.requests.save) or last or stopping or step % self.config.checkpointing_steps == 0:
                    yield from self._save(step)
                if stopping and not last:
                    yield Stopped(step, self.directory.root)
                    return
        except TrainingError as error:
            raise TrainingError(f"{error}. {self._kept()}") from None
        yield from self._finish()

    def _plan(self, done: int) -> Plan:
        return self.plan(
            trainable={name: sum(p.numel() for p in group) for name, group in self.trainer.parameters.items()},
            start_step=done,
            max_train_steps=self.config.max_train_steps,
            device=str(self.place.device),
        )

    def _look(self, step: int) -> Iterator[Event]:
        if self.place.main:
            yield from self.look(step)

    def _looking(self, step: int) -> bool:
        return self.look_every() > 0 and step % self.look_every() == 0

    def _finish(self) -> Iterator[Event]:
        step = self.config.max_train_steps
        peak = torch.cuda.max_memory_allocated(self.place.device) if self.place.on_cuda else None
        if self.place.main:
            yield from self.finish(step)
            self.directory.finish(step)
        yield Done(step, self.directory.root, time.perf_counter() - self.started, peak)

    # ---------------------------------------------------------------- resume and stop

    def _resume(self) -> Generator[Event, None, int]:
        """Put adapters, optimizer and schedule back as the newest checkpoint has them; its step, or 0."""
        step = self.directory.newest_step() or 0
        if self.place.main:
            self.directory.rewind(step)
        if step:
            folder = self.directory.checkpoint(step)
            for name, model in self.trainer.models.items():
                model.assign(ADAPTER, load_adapter(self.adapter_folder(folder, name))[1])
            state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
            for name in self.trainer.load_state_dict(state):
                yield Notice(f"the {name} data have changed since step {step}")
        self.place.wait()
        return step

    def _save(self, step: int) -> Iterator[Event]:
        if not self.place.main:
            return
        with self.directory.new_checkpoint(step, self.config.checkpoints_total_limit) as folder:
            self.write_adapters(folder, step)
            torch.save(self.trainer.state_dict(), folder / _STATE)
        yield Checkpoint(step, self.directory.checkpoint(step))

    def _stopping(self) -> bool:
        """Whether any process was asked to stop; all stop after the same step."""
        asked = self.requests.stop.is_set()
        if self.place.processes == 1:
            return asked
        return self.place.mean(torch.tensor(float(asked), device=self.place.device)).item() > 0

    def _kept(self) -> str:
        step = self.directory.newest_step()
        return "No checkpoint was saved yet" if step is None else f"Kept: {self.directory.checkpoint(step)}"
