"""What state a job is in. Nothing stored is believed that a dead process could have left behind.

    queued → starting → running → done | failed
                  └────────┴→ stopping → stopped
    and, where a worker died or hangs: interrupted

`state.json` says what the worker last did. That a job runs is true only while its worker's process lives (`processes`)
and its heartbeat is fresh; everything else is derived from the two and from the flags in `control/`.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from ..workspace import read_json, write_json
from .processes import runs

State = Literal["queued", "starting", "running", "stopping", "done", "stopped", "failed", "interrupted"]
ACTIVE: tuple[State, ...] = ("starting", "running", "stopping")
ENDED: tuple[State, ...] = ("done", "stopped", "failed", "interrupted")
RESUMABLE: tuple[State, ...] = ("stopped", "failed", "interrupted")

Flag = Literal["stop", "stop_now", "sample_now", "save_now"]
FLAGS: tuple[Flag, ...] = ("stop", "stop_now", "sample_now", "save_now")
FRESH = 10.0
"""Seconds after which a heartbeat, sent every second, is old: a busy machine is late, but not by ten beats."""


@dataclass(frozen=True)
class Record:
    """What `state.json` holds. Times are seconds since 1970."""

    state: State
    queued: float
    """When it was last put into the queue."""
    started: float | None = None
    ended: float | None = None
    step: int = 0
    total: int = 0
    message: str = ""
    process: str | None = None
    """Identity of the worker's process."""

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        values = read_json(folder / "state.json")
        return None if values is None else cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def write(self, folder: Path) -> None:
        write_json(folder / "state.json", asdict(self))


def derived(folder: Path, record: Record) -> State:
    """The state of the job in `folder` now."""
    if record.state not in ACTIVE:
        return record.state
    asked_to_stop = any(asked(folder, flag) for flag in ("stop", "stop_now"))
    if record.process is not None and runs(record.process) and silence(folder) < FRESH:
        return "stopping" if asked_to_stop else record.state
    return "stopped" if asked_to_stop else "interrupted"


# -------------------------------------------------------------------------------- signs from one process to another


def beat(folder: Path) -> None:
    """Tell that the work on `folder` goes on."""
    mark(folder / "heartbeat")


def silence(folder: Path) -> float:
    """Seconds since the last heartbeat."""
    return age(folder / "heartbeat")


def mark(path: Path) -> None:
    """Make `path` new. Its time is the machine's monotonic clock, which neither a corrected clock nor a suspended
    laptop moves: waking up must not look like ten missed heartbeats."""
    path.parent.mkdir(exist_ok=True)
    path.touch()
    now = time.monotonic()
    os.utime(path, (now, now))


def age(path: Path) -> float:
    """Seconds since `path` was marked, infinite if it never was."""
    try:
        return time.monotonic() - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def flag_path(folder: Path, flag: Flag) -> Path:
    return folder / "control" / flag


def asked(folder: Path, flag: Flag) -> bool:
    return flag_path(folder, flag).exists()


def clear_flags(folder: Path) -> None:
    for flag in FLAGS:
        flag_path(folder, flag).unlink(missing_ok=True)
