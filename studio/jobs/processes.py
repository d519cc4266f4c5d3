"""Which process is meant: a number alone lies, since numbers are used again and the dead linger as zombies."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path


def identity(pid: int) -> str | None:
    """A text that no other process ever has, of a process that runs; None for one that is dead or a zombie."""
    started = _started_linux(pid) if sys.platform == "linux" else _started_posix(pid)
    return None if started is None else f"{pid} {started} {_boot()}"


def runs(known: str) -> bool:
    """Whether the process of this identity still lives."""
    return identity(pid_of(known)) == known


def pid_of(known: str) -> int:
    return int(known.split(" ", 1)[0])


def _started_linux(pid: int) -> str | None:
    """Clock ticks from boot to its start: field 22 of /proc/PID/stat. Names may hold spaces and brackets."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else fields[18]


def _started_posix(pid: int) -> str | None:
    said = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, started = said.stdout.strip().partition(" ")
    return None if not started or state.startswith("Z") else "-".join(started.split())


@cache
def _boot() -> str:
    """Ticks start anew with every boot."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else "-"
