"""What a training run tells whoever follows it.

A run is a generator of these events. Terminals, logs and web pages are consumers of one and the same stream, so none of
them needs a hook in the training loop. Front ends add their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Event:
    """Base of everything that a run tells."""

    def line(self) -> str | None:
        """What a terminal says of it; None for what a progress bar shows, or nobody needs to read."""
        return None


@dataclass(frozen=True, kw_only=True)
class Plan(Event):
    """Sent once, before the first step: what is going to be trained, from where to where. Front ends add on what."""

    model: str
    trainable: dict[str, int]
    """Trainable parameters of each component."""
    start_step: int
    """Steps already done: 0 for a fresh run, N when it resumes from `checkpoints/step-N`."""
    max_train_steps: int
    device: str

    def line(self) -> str:
        parts = ", ".join(f"{name} {count:,}" for name, count in self.trainable.items())
        return f"{self.model}; {self.about()}; trainable: {parts}"

    def about(self) -> str:
        """The front end's part of the headline: on what it is trained."""
        raise NotImplementedError


@dataclass(frozen=True)
class Notice(Event):
    """Something the user should know, after which the run goes on: a skipped image, a truncated text."""

    message: str

    def line(self) -> str:
        return f"note: {self.message}"


@dataclass(frozen=True)
class Progress(Event):
    """How far a preparation has come: class images, latents, tokens."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Step(Event):
    """One optimizer step."""

    step: int
    """Counts from 1."""
    loss: float
    """What was minimised."""
    losses: dict[str, float]
    """Its unweighted parts by name, where there are several."""
    learning_rates: dict[str, float]
    """Of each component, as used in this step."""
    gradient_norms: dict[str, float]
    """Of each component, before clipping."""
    seconds: float
    """Wall-clock time of this step."""
    eta: float
    """Seconds that the remaining steps will take at the present pace; what is shown or saved meanwhile not counted."""


@dataclass(frozen=True)
class Evaluation(Event):
    """The loss on data that is held out of the training, after `step` steps."""

    step: int
    loss: float
    """Mean over all that is predicted there, without dropout."""
    count: int
    """How many predictions it is the mean of."""
    seconds: float

    def line(self) -> str:
        return f"held-out loss after step {self.step}: {self.loss:.4f} over {self.count:,} predictions"


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

    def line(self) -> str:
        return f"stopped after step {self.step} and saved; run the same command again to go on"


@dataclass(frozen=True)
class Done(Event):
    """The run is complete and its adapter written."""

    step: int
    output_dir: Path
    seconds: float = 0.0
    """Wall-clock time of this call, 0 when there was nothing left to do."""
    peak_memory: int | None = None
    """Most bytes that tensors held on the CUDA device from the first step on, all that was shown meanwhile included;
    None elsewhere."""

    def line(self) -> str:
        return f"done: step {self.step}, {self.output_dir}"
