"""What a training run tells whoever follows it, and two followers: a progress bar and a metrics file.

A run is a generator of these events. Terminals, logs and web pages are consumers of one and the same stream, so none of
them needs a hook in the training loop.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from ..core.files import write_text


@dataclass(frozen=True)
class Event:
    """Base of everything that a run tells."""


@dataclass(frozen=True)
class Plan(Event):
    """Sent once, before the first step: what is going to be trained, on what, from where to where."""

    model: str
    family: str
    prediction_type: str
    resolution: int
    instance_images: int
    class_images: int
    trainable: dict[str, int]
    """Trainable parameters of each component."""
    start_step: int
    """Steps already done: 0 for a fresh run, N when it resumes from `checkpoints/step-N`."""
    max_train_steps: int
    device: str


@dataclass(frozen=True)
class Notice(Event):
    """Something the user should know, after which the run goes on: a skipped image, a truncated prompt."""

    message: str


@dataclass(frozen=True)
class Progress(Event):
    """How far a preparation has come: class images, latents."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Step(Event):
    """One optimizer step."""

    step: int
    """Counts from 1."""
    loss: float
    """What was minimised: instance + prior_loss_weight * prior."""
    losses: dict[str, float]
    """The unweighted parts: `instance`, and `prior` with prior preservation."""
    learning_rates: dict[str, float]
    """Of each component, as used in this step."""
    gradient_norms: dict[str, float]
    """Of each component, before clipping."""
    seconds: float
    """Wall-clock time of this step."""
    eta: float
    """Seconds that the remaining steps will take at the present pace; samples and checkpoints not counted."""


@dataclass(frozen=True)
class Sample(Event):
    """Sample images were drawn after `step` steps."""

    step: int
    sheet: Path
    """The contact sheet of all samples so far."""
    images: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Checkpoint(Event):
    """The run can be resumed from here, whatever happens next."""

    step: int
    path: Path


@dataclass(frozen=True)
class Stopped(Event):
    """The run was asked to stop and has saved; running the same directory again goes on from `step`."""

    step: int
    output_dir: Path


@dataclass(frozen=True)
class Done(Event):
    """The run is complete and its adapter written."""

    step: int
    output_dir: Path
    seconds: float = 0.0
    """Wall-clock time of this call, 0 when there was nothing left to do."""
    peak_memory: int | None = None
    """Most bytes that tensors held on the CUDA device from the first step on, samples included; None elsewhere."""


class MetricsFile:
    """Appends every `Step` as one line of JSON. Steps strictly increase, also across a kill and a rerun."""

    def __init__(self, path: Path):
        self.path = path

    def truncate(self, step: int) -> None:
        """Drop what was written after `step`, and a line that a kill left half written."""
        if not self.path.exists():
            return
        lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_text(self.path, "".join(kept))

    def write(self, event: Event) -> None:
        if isinstance(event, Step):
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
        match event:
            case Progress(stage, done, total):
                bar = self._bar_of(stage, total, 0)
                bar.update(done - bar.n)
            case Step():
                assert self._bar is not None
                self._loss = event.loss if self._loss is None else 0.95 * self._loss + 0.05 * event.loss
                self._bar.set_postfix(loss=f"{self._loss:.4f}", refresh=False)  # smoothed: one step tells nothing
                self._bar.update(event.step - self._bar.n)
            case Plan():
                parts = ", ".join(f"{name} {count:,}" for name, count in event.trainable.items())
                images = f"{event.instance_images} images, {event.class_images} of the class"
                self._say(f"{event.model} ({event.family}, {event.prediction_type}); {images}; trainable: {parts}")
                self._bar_of("training", event.max_train_steps, event.start_step)
            case Notice(message):
                self._say(f"note: {message}")
            case Stopped():
                self._say(f"stopped after step {event.step} and saved; run the same command again to go on")
            case Done():
                self._say(f"done: step {event.step}, {event.output_dir}")

    def _bar_of(self, stage: str, total: int, initial: int) -> tqdm:
        if self._bar is None or self._stage != stage:
            self._close()
            self._stage = stage
            self._bar = tqdm(total=total, initial=initial, desc=stage, disable=self.disable, dynamic_ncols=True)
        return self._bar

    def _say(self, line: str) -> None:
        if not self.disable:
            tqdm.write(line)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
