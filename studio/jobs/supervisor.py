"""Workers from outside: start one where work waits, and end one that does not obey or no longer lives.

The worker keeps the rules by itself while it can. What is here is for when it cannot: a step that takes minutes after
Stop now, a process that hangs or was halted by somebody. It runs in a thread of the web process, and before a worker is
started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..workspace import Workspace, read_json
from .processes import pid_of, runs
from .states import ACTIVE, Record, age, flag_path, silence
from .store import Job, everything

GRACE = 30.0
"""Seconds after Stop now in which the work may still save a checkpoint."""
FORCE = 5.0
"""Seconds more, after SIGTERM, until SIGKILL."""
HUNG = 30.0
"""Seconds of silence, seen by this process, after which a worker is ended; three times what makes a heartbeat old."""
LOOK = 1.0
"""Seconds between looks."""

_children: list[subprocess.Popen[bytes]] = []
"""Workers that this process has started: kept so that the dead are buried."""


def device() -> str:
    """The device that jobs run on, found without torch: "cuda" where NVIDIA's driver shows one, else "cpu"."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    return "cuda" if not hidden and any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"


def ensure_worker(ws: Workspace, on: str | None = None) -> None:
    """Start a worker for the device, unless one lives."""
    on = on or device()
    _children[:] = [child for child in _children if child.poll() is None]
    if worker_lives(ws, on):
        return
    ws.workers.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "veneer.studio.jobs.worker", str(ws.root.absolute()), on]
    with (ws.workers / f"{on}.log").open("ab") as log:
        _children.append(
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ws.root,
                env=_environment(),
                start_new_session=True,  # neither Ctrl-C nor a closed terminal reaches it
            )
        )


def worker_lives(ws: Workspace, on: str) -> bool:
    known = read_json(ws.workers / f"{on}.json")
    return known is not None and runs(known["process"])


def _environment() -> dict[str, str]:
    """The worker finds this very package, and neither it nor its libraries reach out to the network."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")]))
    return {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": path}


# -------------------------------------------------------------------------------- those that do not obey


@dataclass
class Watch:
    """What one watching process has seen of hearts that do not beat.

    Silence is counted by looks of this process, not by the clock alone: after a machine slept, or this process was
    halted itself, a worker has had no chance to beat either.
    """

    seen: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Job -> the heartbeat's time, and for how many looks it has not changed."""

    def look(self, ws: Workspace) -> None:
        """End what has to be ended, once."""
        for job in everything(ws):
            record = Record.read(job.folder)
            if record is None or record.state not in ACTIVE or record.process is None or not runs(record.process):
                self.seen.pop(job.id, None)
                continue
            overdue = age(flag_path(job.folder, "stop_now"))
            if self._hangs(job) or GRACE + FORCE < overdue < float("inf"):
                _signal(record.process, signal.SIGKILL)
            elif GRACE < overdue < float("inf"):
                _signal(record.process, signal.SIGTERM)

    def _hangs(self, job: Job) -> bool:
        beat = round(time.monotonic() - silence(job.folder), 1)
        before, looks = self.seen.get(job.id, (beat, 0))
        self.seen[job.id] = (beat, looks + 1 if abs(beat - before) < 0.5 else 0)
        return self.seen[job.id][1] * LOOK >= HUNG


def _signal(process: str, number: signal.Signals) -> None:
    """Signal a worker with all that it has started; it leads a group of its own."""
    if not runs(process):
        return
    try:
        os.killpg(pid_of(process), number)
    except (ProcessLookupError, PermissionError):  # it has just ended by itself, or it leads no group
        os.kill(pid_of(process), number) if runs(process) else None


class Supervisor:
    """The thread: `start()` it with the web process. It keeps a worker alive while work waits, and order among them."""

    def __init__(self, ws: Workspace, on: str | None = None):
        self.ws, self.on = ws, on or device()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; workers go on."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        watch = Watch()
        while not self._over.wait(LOOK):
            try:
                watch.look(self.ws)
                if any(job.state == "queued" for job in everything(self.ws)):
                    ensure_worker(self.ws, self.on)
            except OSError as error:  # a full disk or a job deleted under our eyes: look again
                print(f"studio: {error}", file=sys.stderr)
