"""A job as the work sees it: where it writes, what it tells, what is asked of it meanwhile."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...core.runs.events import Checkpoint, Done, Event, Notice, Progress, Step, Stopped
from ...core.runs.settings import plain
from ...diffusion.events import Plan, Sample
from ..workspace import Workspace
from .states import Flag, Record, State, asked, beat, flag_path
from .store import Job

BEAT = 1.0
"""Seconds between heartbeats."""
LOOK = 0.2
"""Seconds between looks for what is asked."""


class Asked(Exception):  # noqa: N818  (no error: somebody asked for the end)
    """The work was asked to stop, and has; its text says where."""


class Leaving(Asked):
    """The same, by a signal to the process, which should end too."""


@dataclass
class Task:
    """One attempt at one job. A thread keeps its heart beating while the work runs in the main one."""

    ws: Workspace
    job: Job
    device: str
    record: Record
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _answers: dict[Flag, Callable[[], None]] = field(default_factory=dict)
    _written: Record | None = None
    _over: threading.Event = field(default_factory=threading.Event)

    @property
    def arguments(self) -> dict[str, Any]:
        return self.job.arguments

    @property
    def out(self) -> Path:
        return self.job.out

    @property
    def stopping(self) -> bool:
        return asked(self.job.folder, "stop") or asked(self.job.folder, "stop_now")

    def answer(self, flag: Flag, action: Callable[[], None]) -> None:
        """Call `action`, from another thread, when somebody asks for `flag`."""
        self._answers[flag] = action

    def check(self) -> None:
        """Raise `Asked` if the work should stop here, where nothing is half done."""
        if self.stopping:
            raise Asked("Stopped as asked.")

    # ---------------------------------------------------------------- what is told

    def tell(self, event: Event) -> None:
        """Append to events.jsonl, and keep the state's own summary of how far it has come."""
        line = json.dumps({"event": type(event).__name__, **plain(event)}, ensure_ascii=False)
        with (self.job.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        was = self.record.state
        self.record = summary(replace(self.record, state="running"), event, self.job.kind)
        if self.record.state != was:
            self.write()

    def end(self, state: State, message: str) -> None:
        """The last word."""
        self.record = replace(self.record, state=state, message=message, ended=time.time())
        self.write()

    def write(self) -> None:
        with self._lock:
            if self.record != self._written:
                written = self.record
                written.write(self.job.folder)
                self._written = written

    # ---------------------------------------------------------------- the pulse

    def __enter__(self) -> Task:
        self._thread = threading.Thread(target=self._pulse, name="pulse", daemon=True)
        self._mend()
        beat(self.job.folder)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _mend(self) -> None:
        """End the line that a kill left half written, so that the next one stands alone."""
        path = self.job.folder / "events.jsonl"
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            with path.open("a") as file:
                file.write("\n")

    def _pulse(self) -> None:
        last = 0.0
        while not self._over.wait(LOOK):
            self._serve()
            if time.monotonic() - last >= BEAT:
                last = time.monotonic()
                try:
                    self.write()
                    beat(self.job.folder)
                except OSError:  # a full disk: the work itself will say so, and the heart has to go on
                    continue

    def _serve(self) -> None:
        for flag, action in list(self._answers.items()):
            if asked(self.job.folder, flag):
                if flag in ("sample_now", "save_now"):
                    flag_path(self.job.folder, flag).unlink(missing_ok=True)  # each asking is answered once
                else:
                    del self._answers[flag]
                action()


def summary(record: Record, event: Event, kind: str) -> Record:
    """The state after an event: for a training its steps count, for other work its pieces."""
    match event:
        case Plan():
            message = f"Training on {event.instance_images} images."
            return replace(record, step=event.start_step, total=event.max_train_steps, message=message)
        case Step():
            left = f", about {spoken(event.eta)} left" if event.eta >= 1 else ""
            return replace(record, step=event.step, message=f"Loss {event.loss:.4f}{left}.")
        case Progress(stage, done, total):
            message = f"Preparing {stage}: {done} of {total}." if kind == "train" else f"{stage}: {done} of {total}."
            counted = {} if kind == "train" else {"step": done, "total": total}
            return replace(record, message=message, **counted)
        case Sample():
            return replace(record, message=f"Samples drawn after step {event.step}.")
        case Checkpoint():
            return replace(record, message=f"Saved after step {event.step}.")
        case Stopped():
            return replace(record, step=event.step, message=f"Stopped after step {event.step} and saved.")
        case Done():
            return replace(record, step=event.step, total=max(record.total, event.step), message="Complete.")
        case Notice(message):
            return replace(record, message=message)
    return record


def spoken(seconds: float) -> str:
    """A duration for people: "40 s", "3 min", "2 h 10 min"."""
    if seconds < 100:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
