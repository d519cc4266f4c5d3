"""What the machine and the studio are doing, and a diagnostics file to go with a question."""

from __future__ import annotations

import io
import json
import platform
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..jobs import store
from ..jobs.supervisor import device, worker_lives
from ..safety import folder_size
from ..workspace import Workspace

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "gradio", "Pillow")
LOG = 20_000
"""Bytes of the worker's log that diagnostics hold."""


@dataclass(frozen=True)
class Status:
    """The studio at a moment."""

    device: str
    worker: bool
    """Whether a worker lives; it ends by itself when nothing is to be done."""
    waiting: int
    running: int
    free: int
    """Bytes left on the disk of the data folder."""
    used: int
    """Bytes of the user's own pictures, adapters and trash."""
    versions: dict[str, str]


def status(ws: Workspace, user: str) -> Status:
    states = [job.state for job in store.everything(ws)]
    return Status(
        device=device(),
        worker=worker_lives(ws, device()),
        waiting=states.count("queued"),
        running=sum(state in ("starting", "running", "stopping") for state in states),
        free=shutil.disk_usage(ws.root).free,
        used=folder_size(ws.user(user)),
        versions=versions(),
    )


@dataclass(frozen=True)
class Person:
    """Somebody who may log in."""

    name: str
    used: int
    """Bytes of own data."""
    adapters: int
    active: int
    """Jobs that wait or run."""
    last: float | None
    """When the newest job was begun, in seconds since 1970."""


def people(ws: Workspace, user: str, users: Sequence[str]) -> list[Person]:
    """Everybody who may log in, for whoever runs the studio: the first user of the file. Empty for all others."""
    if not users or user != users[0]:
        return []
    jobs = store.everything(ws)
    return [_person(ws, name, [job for job in jobs if job.owner == name]) for name in users]


def _person(ws: Workspace, name: str, jobs: Sequence[store.Job]) -> Person:
    adapters = len(list(ws.adapters(name).glob("*/card.json")))
    active = sum(job.active for job in jobs)
    return Person(name, folder_size(ws.user(name)), adapters, active, max((j.created for j in jobs), default=None))


def versions() -> dict[str, str]:
    """Installed versions, read without importing anything."""
    from ... import __version__

    found = {"veneer": __version__, "python": platform.python_version(), "system": platform.system()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def diagnostics(ws: Workspace, user: str) -> Path:
    """A zip to go with a question: versions, states of the user's jobs, the end of the worker's log. No pictures, no
    captions, no prompts, no names of other users."""
    jobs = [job for job in store.list_jobs(ws, user) if job.id]
    with io.BytesIO() as content:
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("status.json", json.dumps(asdict(status(ws, user)), indent=1))
            archive.writestr("jobs.json", json.dumps([_job(job) for job in jobs], indent=1))
            for path in ws.workers.glob("*.log"):
                archive.writestr(path.name, path.read_bytes()[-LOG:])
        target = ws.user(user) / "diagnostics.zip"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.getvalue())
    return target


def _job(job: store.Job) -> dict[str, object]:
    keep = ("id", "kind", "state", "created", "started", "ended", "step", "total")
    return {name: getattr(job, name) for name in keep}
