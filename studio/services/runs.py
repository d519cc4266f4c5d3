"""Trainings: begin one, see how it goes, keep what came of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...core.runs.settings import to_yaml
from ..errors import NotFound, StudioError
from ..jobs import store
from ..shelf import shelve
from ..workspace import Workspace
from . import datasets, models, recipes
from .references import FINAL, find, steps

POINTS = 500
"""Most points of a loss curve: as many as a screen has columns for it."""
SMOOTH = 0.95
"""Share of the past in the smoothed loss; a single step's loss tells next to nothing."""


@dataclass(frozen=True)
class Point:
    step: int
    loss: float
    smoothed: float


@dataclass(frozen=True)
class Row:
    """The samples of one prompt and seed."""

    prompt: str
    seed: int
    pictures: tuple[Path | None, ...]
    """One for each step of `Progress.sampled`; None where it has not been drawn."""


@dataclass(frozen=True)
class Progress:
    """How a training goes."""

    job: store.Job
    points: tuple[Point, ...]
    sampled: tuple[int, ...]
    """The steps at which samples were drawn, from 0."""
    samples: tuple[Row, ...]
    checkpoints: tuple[int, ...]
    """Steps that can be added to the library."""
    eta: float | None
    """Seconds that the remaining steps will take; None while nobody knows."""
    finished: bool
    """Whether there is a final adapter."""


def start_training(ws: Workspace, user: str, dataset: str, recipe: dict[str, Any]) -> str:
    """Begin a training; the job's id. The pictures are kept as they are now, whatever becomes of the data set.

    Arguments:
        recipe: the arguments of `recipes.build` by name (goal, method, trigger, preset, advanced), `model` by its name
            in the list, and `name` of the run.

    Raises:
        StudioError: too few pictures, or a recipe that cannot be.
    """
    found = datasets.get(ws, user, dataset)
    settings = settings_of(ws, found, recipe)
    arguments = {
        "dataset": found.id,
        "name": str(recipe.get("name") or found.name)[:80],
        "recipe": {name: value for name, value in recipe.items() if name != "name"},
        "config": settings,
        "pictures": _fingerprint(found),
    }
    return store.submit(ws, user, "train", arguments, lambda folder: datasets.snapshot(found, folder / "data"))


def settings_of(ws: Workspace, dataset: datasets.Dataset, recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings that a recipe leads to, checked: for the review before Start too."""
    if not dataset.pictures:
        raise StudioError("This data set has no pictures yet. Add 3 to 30, then start.")
    known = ("goal", "method", "trigger", "preset", "advanced")
    unknown = sorted(recipe.keys() - {*known, "model", "name"})
    if unknown:
        raise StudioError(f"A recipe has no {', '.join(unknown)}.")
    given = {name: recipe[name] for name in known if name in recipe}
    try:
        return recipes.build(dataset, **given, model=models.source_of(ws, recipe.get("model", "embedded")))
    except TypeError as error:
        raise StudioError("Choose a goal and a method, and type the trigger words.") from error


def _fingerprint(dataset: datasets.Dataset) -> str:
    """The same for the same pictures and captions: after a change, Start means another run."""
    told = [(picture.id, picture.caption, picture.path.stat().st_size) for picture in dataset.pictures]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


# -------------------------------------------------------------------------------- see how it goes


def progress(ws: Workspace, user: str, job: str) -> Progress:
    """How a training stands. Cheap enough to be asked every second.

    Raises:
        NotFound, PermissionDenied: no such training, or somebody else's.
    """
    found = _training(ws, user, job)
    told = _metrics(found.out / "metrics.jsonl")
    sampled, rows = _samples(found)
    return Progress(
        job=found,
        points=_curve(told),
        sampled=sampled,
        samples=rows,
        checkpoints=tuple(steps(found.out)),
        eta=told[-1][2] if told and found.state == "running" else None,
        finished=(found.out / "finished.json").is_file(),
    )


def _training(ws: Workspace, user: str, job: str) -> store.Job:
    found = store.owned(ws, user, job)
    if found.kind != "train":
        raise NotFound("This job is no training. Choose one from the list of runs.")
    return found


def _metrics(path: Path) -> tuple[tuple[int, float, float], ...]:
    """(step, loss, seconds left) of every step; a resumed run has cut it back to what counts."""
    try:
        about = path.stat()
    except FileNotFoundError:
        return ()
    return _read_metrics(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=64)
def _read_metrics(path: Path, _changed: int, _size: int) -> tuple[tuple[int, float, float], ...]:
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    told = (json.loads(line) for line in lines)
    return tuple((step["step"], step["loss"], step["eta"]) for step in told)


@lru_cache(maxsize=64)
def _curve(told: tuple[tuple[int, float, float], ...]) -> tuple[Point, ...]:
    """Raw and smoothed loss; of long runs every nth step, and the last."""
    points, mean, weight = [], 0.0, 0.0
    for step, loss, _ in told:
        mean, weight = SMOOTH * mean + (1 - SMOOTH) * loss, SMOOTH * weight + (1 - SMOOTH)
        points.append(Point(step, loss, mean / weight))  # divided by the weights so far, the start is no outlier
    stride = -(-len(points) // (POINTS - 1)) or 1
    return (*points[:-1:stride], *points[-1:])


def _samples(job: store.Job) -> tuple[tuple[int, ...], tuple[Row, ...]]:
    """Steps, and a row for each prompt and seed. The run numbers its pictures in that order."""
    config = job.arguments["config"]
    folders = sorted((job.out / "samples").glob("step-*"))
    pictures = [{int(path.name[:2]): path for path in folder.glob("[0-9][0-9]*.png")} for folder in folders]
    prompts = config["sample_prompts"] or [config["instance_prompt"]]
    wanted = [(prompt, seed) for prompt in prompts for seed in config["sample_seeds"]]
    rows = tuple(Row(*asked, tuple(here.get(i) for here in pictures)) for i, asked in enumerate(wanted))
    return tuple(int(folder.name.removeprefix("step-")) for folder in folders), rows


# -------------------------------------------------------------------------------- keep what came of it


def add_to_library(ws: Workspace, user: str, job: str, step: int | None = None, name: str = "") -> str:
    """Copy what a training has learnt into the library; the adapter's id.

    Arguments:
        step: a checkpoint's; None takes the final adapter, or before the end the newest checkpoint.

    Raises:
        StudioError: nothing has been saved yet, or not at this step.
    """
    found = _training(ws, user, job)
    saved, finished = steps(found.out), (found.out / "finished.json").is_file()
    if step is None and not finished and not saved:
        raise StudioError("Nothing has been saved yet. Press Save now, or wait for the first checkpoint.")
    if step is not None and step not in saved:
        raise StudioError(
            f"Nothing was saved at step {step}. Choose one of {', '.join(map(str, saved)) or 'none yet'}."
        )
    final = step is None and finished
    source = find(ws, user, f"{found.id}:{FINAL if final else saved[-1] if step is None else step}").path
    at = found.arguments["config"]["max_train_steps"] if final else int(source.name.removeprefix("step-"))
    return shelve(ws, user, source, _card(found, at, name), _newest_sample(found, at))


def _card(job: store.Job, step: int, name: str) -> dict[str, Any]:
    config = job.arguments["config"]
    parts = [config[part] for part in ("unet", "text_encoder") if config[part]["method"] != "none"]
    return {
        "name": name.strip() or job.arguments["name"],
        "base": config["model"],
        "method": ", ".join(dict.fromkeys(_title(part) for part in parts)),
        "rank": sorted({part["rank"] for part in parts if recipes.has(part["method"], "rank")}),
        "trigger": config["instance_prompt"],
        "recipe": to_yaml(config),
        "source": f"trained here, step {step}",
        "job": job.id,
    }


def _title(part: dict[str, Any]) -> str:
    return recipes.METHODS["dora" if part["dora"] and part["method"] == "lora" else part["method"]].title


def _newest_sample(job: store.Job, step: int) -> Path | None:
    """The first picture of the last samples that were drawn by then."""
    sampled, rows = _samples(job)
    until: Iterable[Path | None] = reversed(rows[0].pictures[: sum(at <= step for at in sampled)]) if rows else ()
    return next((picture for picture in until if picture is not None), None)
