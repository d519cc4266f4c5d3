"""Jobs as the rest of the studio sees them: submit, look, follow, ask to stop, resume, all by files.

Every change of a job's state that is not its worker's own passes through one lock, so that of two clicks on Start, or
of a Stop and a worker that is about to begin, exactly one comes first.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...core.atomic import atomic_folder
from ..errors import NotFound, PermissionDenied, StudioError
from ..workspace import Workspace, checked_id, locked, new_id, read_json, write_json
from .processes import runs
from .states import ACTIVE, ENDED, FLAGS, RESUMABLE, Flag, Record, State, asked, clear_flags, derived, flag_path, mark

KINDS = ("train", "draw", "grid", "blend", "compare", "convert", "fetch")
MAX_QUEUED = 50
"""Jobs that one user may have waiting; more is a mistake or worse."""


@dataclass(frozen=True)
class Job:
    """A job as it stands. What another user may know of it is its kind, state and place in the queue."""

    id: str
    kind: str
    owner: str
    state: State
    created: float
    """Seconds since 1970, as all times here."""
    queued: float
    started: float | None = None
    ended: float | None = None
    step: int = 0
    total: int = 0
    message: str = ""
    position: int | None = None
    """Place in the queue, 1 comes next; None for what does not wait."""
    arguments: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def active(self) -> bool:
        """Whether anything about it can still change by itself."""
        return self.state not in ENDED

    @property
    def resumable(self) -> bool:
        return self.state in RESUMABLE

    @property
    def out(self) -> Path:
        """What it has made. Of a training, the run's directory."""
        return self.folder / "out"

    def redacted(self) -> Job:
        return Job("", self.kind, "", self.state, self.created, self.queued, position=self.position)


# -------------------------------------------------------------------------------- look


def load(ws: Workspace, job: object, *, position: bool = True) -> Job:
    """One job, whoever owns it. `position=False` saves the look at the whole queue.

    Raises:
        NotFound: there is no such job.
    """
    found = _read(ws, ws.job(job))
    if found is None:
        raise NotFound("This job does not exist any more. Choose another one from the list.")
    if position and found.state == "queued":
        places = {waiting.id: place for place, waiting in enumerate(queue(everything(ws)), 1)}
        return replace(found, position=places.get(found.id))
    return found


def owned(ws: Workspace, user: str, job: object, **look: bool) -> Job:
    """One job of this user.

    Raises:
        NotFound, PermissionDenied: no such job, or somebody else's.
    """
    found = load(ws, job, **look)
    if found.owner != user:
        raise PermissionDenied("This job belongs to somebody else. Choose one of your own from the list.")
    return found


def list_jobs(ws: Workspace, user: str) -> list[Job]:
    """The user's own jobs, newest first, and what others have waiting or running, redacted."""
    jobs = everything(ws)
    places = {waiting.id: place for place, waiting in enumerate(queue(jobs), 1)}
    placed = [replace(job, position=places.get(job.id)) for job in jobs]
    shown = [job if job.owner == user else job.redacted() for job in placed if job.owner == user or job.active]
    return sorted(shown, key=lambda job: job.created, reverse=True)


def everything(ws: Workspace) -> list[Job]:
    """All jobs of all users: for the worker and for whoever counts."""
    folders = (path for path in ws.jobs.glob("*") if not path.name.startswith("."))
    return [job for folder in folders if (job := _read(ws, folder)) is not None]


def _read(ws: Workspace, folder: Path) -> Job | None:
    spec, record = read_json(folder / "spec.json"), Record.read(folder)
    if spec is None or record is None:
        return None
    now = derived(folder, record)
    return Job(
        id=folder.name,
        kind=spec["kind"],
        owner=spec["owner"],
        state=now,
        created=spec["created"],
        queued=record.queued,
        started=record.started,
        ended=record.ended,
        step=record.step,
        total=record.total,
        message=record.message if now == record.state else _MEANING.get(now, record.message),
        arguments=spec["arguments"],
        folder=folder,
    )


_MEANING = {
    "interrupted": "The worker was ended from outside. Resume goes on from the last saved step.",
    "stopped": "Stopped at once. Resume goes on from the last saved step.",
    "stopping": "Stopping: the present step is finished and saved first.",
}


def queue(jobs: Iterable[Job]) -> list[Job]:
    """What waits, in the order in which it will be done: owners take turns, each owner's jobs first come first served.

    Whose last job began longest ago comes first, so that one who asks for a hundred pictures does not keep out one who
    asks for a single one.
    """
    turns: dict[str, float] = {}
    waiting: list[Job] = []
    for job in jobs:
        turns[job.owner] = max(turns.get(job.owner, 0.0), job.started or 0.0)
        waiting += [job] if job.state == "queued" else []
    order: list[Job] = []
    while waiting:
        first = min(waiting, key=lambda job: (turns[job.owner], job.queued, job.id))
        waiting.remove(first)
        order.append(first)
        turns[first.owner] = time.time() + len(order)
    return order


def events(ws: Workspace, user: str, job: object, after: int = 0) -> tuple[list[dict[str, Any]], int]:
    """What a job has told since position `after`, and the position to ask with next time; 0 is the beginning.

    Each is one of `diffusion.events` as a dict, its class's name under "event". A line that is still being written is
    left for the next call.
    """
    path = owned(ws, user, job, position=False).folder / "events.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, after))
            data = file.read()
    except FileNotFoundError:
        return [], 0
    whole = data[: data.rfind(b"\n") + 1]
    return list(_parsed(whole)), max(0, after) + len(whole)


def _parsed(lines: bytes) -> Iterator[dict[str, Any]]:
    for line in lines.splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # what a kill left half written, before the resumed run went on in the next line
            continue


def log(ws: Workspace, user: str, job: object, most: int = 20_000) -> str:
    """The end of what a job's libraries printed, `most` bytes of it."""
    path = owned(ws, user, job, position=False).folder / "log.txt"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


# -------------------------------------------------------------------------------- change


@contextmanager
def changing(ws: Workspace) -> Iterator[None]:
    """Nobody else submits, claims, stops or resumes meanwhile."""
    with locked(ws.jobs / ".lock"):
        yield


def submit(
    ws: Workspace, user: str, kind: str, arguments: dict[str, Any], fill: Callable[[Path], None] | None = None
) -> str:
    """Put work into the queue; its id. The same work, asked for again while it waits or runs, is the same job.

    Arguments:
        fill: puts what the work needs beside its arguments into the job's folder, before anybody sees that.

    Raises:
        StudioError: an unknown kind, or too much is waiting already.
    """
    if kind not in KINDS:
        raise StudioError(f"{kind!r} is no kind of job; there are {', '.join(KINDS)}.")
    ws.user(user)  # a name that cannot be one is refused here
    arguments = json.loads(json.dumps(arguments))  # as it will be read back, so that a repetition is recognised
    with changing(ws):
        own = [job for job in everything(ws) if job.owner == user and job.active]
        for job in own:
            if job.kind == kind and job.arguments == arguments and job.state != "stopping":
                return job.id
        if sum(job.state == "queued" for job in own) >= MAX_QUEUED:
            raise StudioError(f"You have {MAX_QUEUED} jobs waiting. Let some finish, or stop them, then try again.")
        return _create(ws, user, kind, arguments, fill)


def _create(ws: Workspace, user: str, kind: str, arguments: dict[str, Any], fill: Callable[[Path], None] | None) -> str:
    now, job = time.time(), new_id()
    with atomic_folder(ws.job(job)) as folder:
        (folder / "control").mkdir()
        (folder / "out").mkdir()
        write_json(folder / "spec.json", {"kind": kind, "owner": user, "created": now, "arguments": arguments})
        Record("queued", now).write(folder)
        if fill is not None:
            fill(folder)
    return job


def request(ws: Workspace, user: str, job: object, flag: Flag) -> None:
    """Ask a job for something: "stop" (finish the step, save, end), "stop_now" (the same within half a minute, or else
    by force), "sample_now", "save_now". Asked twice is asked once; a job that has ended needs no stopping.

    Raises:
        StudioError: an unknown flag, or samples of a job that does not train.
    """
    if flag not in FLAGS:
        raise StudioError(f"{flag!r} cannot be asked of a job; one can ask {', '.join(FLAGS)}.")
    with changing(ws):
        found = owned(ws, user, job, position=False)
        if flag in ("sample_now", "save_now") and not (found.kind == "train" and found.state in ACTIVE):
            raise StudioError("Only a training that runs can draw samples or save now. Start or resume it first.")
        if found.state == "queued" and flag in ("stop", "stop_now"):
            _end_waiting(found.folder)
        elif found.state in ACTIVE and not asked(found.folder, flag):
            mark(flag_path(found.folder, flag))


def _end_waiting(folder: Path) -> None:
    record = Record.read(folder)
    assert record is not None
    replace(record, state="stopped", ended=time.time(), message="Taken out of the queue.").write(folder)


def resume(ws: Workspace, user: str, job: object) -> None:
    """Put a job that was stopped, interrupted or has failed back into the queue. Training goes on from its newest
    checkpoint; other work starts anew.

    Raises:
        StudioError: it is done, so that there is nothing to resume.
    """
    with changing(ws):
        found = owned(ws, user, job, position=False)
        if found.active:
            return
        if not found.resumable:
            raise StudioError("This job is complete; there is nothing to resume. Duplicate it to run it again.")
        if _held(found):
            raise StudioError("Its worker hangs and is being ended. Try again in a minute.")
        clear_flags(found.folder)
        step, total = (found.step, found.total) if found.kind == "train" else (0, 0)
        Record("queued", time.time(), found.started, step=step, total=total).write(found.folder)


def _held(job: Job) -> bool:
    """Whether a process that hangs is still at it: it may wake up."""
    record = Record.read(job.folder)
    return record is not None and record.state in ACTIVE and record.process is not None and runs(record.process)


def duplicate(ws: Workspace, user: str, job: object) -> dict[str, Any]:
    """The arguments of a job, to begin another one with."""
    return owned(ws, user, checked_id(job), position=False).arguments


def delete(ws: Workspace, user: str, job: object) -> None:
    """Remove a job that has ended, with all it made. What was added to the library stays there.

    Raises:
        StudioError: it still waits or runs.
    """
    with changing(ws):
        found = owned(ws, user, job, position=False)
        if found.active or _held(found):
            raise StudioError("This job has not ended. Stop it first, then delete it.")
        gone = ws.jobs / f".deleted-{found.id}"
        found.folder.rename(gone)  # at once for everybody who looks, however long the files take
    shutil.rmtree(gone, ignore_errors=True)
