"""The process that does the work: `python -m veneer.studio.jobs.worker ROOT DEVICE`, one a device.

It takes one job after another from the queue, keeps the last pipeline in memory so that previews start at once, and
ends when nothing has been asked of it for a while. Whoever started it may die; it goes on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..workspace import Workspace, write_json
from .processes import identity
from .states import Record, beat, clear_flags
from .store import changing, everything, queue
from .task import Asked, Leaving, Task

if TYPE_CHECKING:
    from .work import Warm

IDLE = 600.0
"""Seconds without work after which the process ends and gives its memory back."""
POLL = 0.3
"""Seconds between looks into the queue."""


def main(root: str, device: str, idle: float = IDLE) -> None:
    """Work until there is nothing left to do; at once if another process serves this device already."""
    ws = Workspace(Path(root).absolute())
    with _alone(ws, device) as alone:
        if alone:
            serve(ws, device, idle)


@contextmanager
def _alone(ws: Workspace, device: str) -> Iterator[bool]:
    """Hold the device's lock, which dies with its process, and tell who holds it."""
    ws.workers.mkdir(parents=True, exist_ok=True)
    with (ws.workers / f"{device}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        write_json(ws.workers / f"{device}.json", {"process": identity(os.getpid())})
        yield True


def serve(ws: Workspace, device: str, idle: float) -> None:
    from .work import Warm

    warm, quiet_since = Warm(device), time.monotonic()
    while time.monotonic() - quiet_since < idle and ws.root.exists():
        task = claim(ws, device)
        if task is None:
            warm.load_libraries()  # while nobody waits for them
            time.sleep(POLL)
            continue
        if not attempt(task, warm):
            return
        quiet_since = time.monotonic()


def claim(ws: Workspace, device: str) -> Task | None:
    """Take the job whose turn it is."""
    with changing(ws):
        waiting = queue(everything(ws))
        if not waiting:
            return None
        job = waiting[0]
        before = Record.read(job.folder)
        assert before is not None
        clear_flags(job.folder)
        beat(job.folder)
        record = replace(
            before, state="starting", started=time.time(), message="Starting.", process=identity(os.getpid())
        )
        record.write(job.folder)
        return Task(ws, job, device, record)


def attempt(task: Task, warm: Warm) -> bool:
    """Do one job to its end, whatever that is. False if this process should not do another one."""
    from .work import WORK

    with output_to(task.job.folder / "log.txt"), task:
        try:
            WORK[task.job.kind](task, warm)
        except Asked as stop:
            task.end("stopped", str(stop))
            return not isinstance(stop, Leaving)
        except Exception as error:
            traceback.print_exc()
            warm.clear()
            task.end("failed", explain(error))
            return isinstance(error, _EXPECTED)  # after anything else a fresh process is the safer one
        task.end("done", task.record.message)
        return True


_EXPECTED = (ValueError, OSError)
"""What the work raises where it was asked for something impossible; StudioError and ConfigError are among them."""


def explain(error: BaseException) -> str:
    """An error for the person at the browser; where it came from stands in the log."""
    words = " ".join(str(error).split())
    if "out of memory" in words.lower() or isinstance(error, MemoryError):
        return (
            "There was not enough memory. Choose a lower resolution, a batch of 1 or gradient checkpointing, "
            "then duplicate the run."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "The disk is full. Delete runs or data sets that are no longer needed, then resume."
    if isinstance(error, _EXPECTED) or type(error).__name__ == "TrainingError":
        return words
    return f"Something went wrong that should not ({type(error).__name__}: {words}). The log has the details."


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send what Python and its libraries print to the end of a file, also what C code prints."""
    with path.open("a", buffering=1) as file:
        kept = [(number, os.dup(number)) for number in (1, 2)]
        try:
            for number, _ in kept:
                os.dup2(file.fileno(), number)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in kept:
                os.dup2(copy, number)
                os.close(copy)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
