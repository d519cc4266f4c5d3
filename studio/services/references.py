"""What a page may name: adapters in the library and those of trainings, as text that means nothing to others.

A reference is the id of an adapter in the user's library, or `JOB:STEP` for a checkpoint of one of the user's
trainings, `JOB:final` for what a job ended with. Nobody can refer to what is somebody else's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from .. import safety
from ..errors import NotFound, StudioError
from ..jobs.store import owned
from ..workspace import Workspace
from . import library

FINAL = "final"
WEIGHTS = -4.0, 4.0
"""Least and most weight: 1 is as trained, and beyond 2 pictures break."""


@dataclass(frozen=True)
class Named:
    """An adapter that a reference means."""

    name: str
    path: Path
    """What to load: a folder or a file."""
    base: str
    """The model that it is for, "" if nobody knows."""
    trigger: str


def find(ws: Workspace, user: str, reference: object) -> Named:
    """The adapter that a reference means.

    Raises:
        NotFound, PermissionDenied: there is none, or it is not this user's.
    """
    identifier, colon, step = str(reference).partition(":")
    if not colon:
        adapter = library.get(ws, user, identifier)
        return Named(adapter.name, adapter.path, adapter.base, adapter.trigger)
    job = owned(ws, user, identifier, position=False)
    config = job.arguments.get("config", {})
    name = f"{job.arguments.get('name', 'adapter')} {step}"
    return Named(name, _made(job.out, step), config.get("model", ""), config.get("instance_prompt", ""))


def _made(out: Path, step: str) -> Path:
    """Where a training has put its adapter, or that of a step."""
    if step == FINAL:
        if (out / "finished.json").is_file():
            return out
        raise NotFound("This training is not complete. Choose one of its checkpoints, or wait for its end.")
    path = out / "checkpoints" / f"step-{int(step):06d}" if step.isdigit() and len(step) < 9 else out / "none"
    if path.is_dir():
        return path
    raise NotFound(f"Nothing was saved at step {step[:20]}. Choose another one.")


def steps(out: Path) -> list[int]:
    """Steps of the checkpoints in a run's directory."""
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*"))


def inputs(ws: Workspace, user: str, wanted: Mapping[str, float] | Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """References with weights, as jobs keep them: where each adapter lies in the workspace, its name, its weight.

    Raises:
        StudioError: an adapter that is not there, the same one twice, or a weight that is no number from -4 to 4.
    """
    pairs = list(wanted.items() if isinstance(wanted, Mapping) else wanted)
    if len({reference for reference, _ in pairs}) < len(pairs):
        raise StudioError("The same adapter is chosen twice. Choose it once, at the sum of the weights.")
    found: list[dict[str, Any]] = []
    for reference, weight in pairs:
        adapter = find(ws, user, reference)
        path = adapter.path.absolute().relative_to(ws.root.absolute()).as_posix()
        found.append({"path": path, "name": _unused(adapter.name, found), "weight": checked_weight(weight)})
    return found


def checked_weight(weight: Any) -> float:
    least, most = WEIGHTS
    if isinstance(weight, (int, float)) and isfinite(weight) and least <= weight <= most:
        return float(weight)
    raise StudioError(f"{weight!r} is no weight: choose a number from {least:g} to {most:g}; 1 is as trained.")


def _unused(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    """A name for use on a pipeline, which each of several adapters has to itself."""
    clean, taken = safety.slug(name), {adapter["name"] for adapter in found} | {"blend", "default"}
    return next(choice for choice in (clean, *(f"{clean}-{n}" for n in range(2, 99))) if choice not in taken)
