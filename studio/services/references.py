"""What a page may name: adapters in the library and those of trainings, as text that means nothing to others.

A reference is the id of an adapter in the user's library, or `JOB:STEP` for a checkpoint of one of the user's
trainings, `JOB:final` for what a job ended with. Nobody can refer to what is somebody else's.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import NotFound
from ..jobs.store import owned
from ..workspace import Workspace

FINAL = "final"


def adapter_path(ws: Workspace, user: str, reference: str) -> Path:
    """The folder with the adapter's files.

    Raises:
        NotFound, PermissionDenied: there is none, or it is not this user's.
    """
    identifier, colon, step = reference.partition(":")
    folder = _of_job(ws, user, identifier, step) if colon else ws.adapter(user, identifier)
    if not folder.is_dir():
        raise NotFound("This adapter is not there any more. Choose another one from the library.")
    return folder


def _of_job(ws: Workspace, user: str, job: str, step: str) -> Path:
    out = owned(ws, user, job, position=False).out
    if step == FINAL:
        if (out / "finished.json").is_file() or (out / "blend.json").is_file():
            return out
        raise NotFound("This job is not complete. Choose one of its checkpoints, or wait for its end.")
    if not step.isdigit():
        raise NotFound(f"{step[:20]!r} is no step of a training.")
    return out / "checkpoints" / f"step-{int(step):06d}"


def steps(out: Path) -> list[int]:
    """Steps of the checkpoints in a run's directory."""
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*"))
