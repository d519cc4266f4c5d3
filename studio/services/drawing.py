"""Pictures on demand: prompts by seeds with weighted adapters, and the same picture with different ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...diffusion.families import EMBEDDED
from ..errors import StudioError
from ..jobs import store
from ..workspace import Workspace
from . import models, references

MAX_PICTURES = 256
"""In one job: an hour on a CPU with the model in the box."""
MAX_ADAPTERS = 4
SAMPLERS = ("dpm++", "ddim", "euler", "unipc", "pndm", "pipeline")
Weighted = Mapping[str, float] | Sequence[tuple[str, float]]
"""References to adapters, each with its weight."""


@dataclass(frozen=True)
class Cell:
    """A picture that was asked for."""

    prompt: str
    seed: int
    picture: Path | None
    """None while it is not drawn."""
    label: str = ""
    row: int = 0
    column: int = 0
    weights: tuple[float, ...] = ()
    """Of each adapter of the job, in order."""
    blended: bool = False


def draw(
    ws: Workspace,
    user: str,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    adapters: Weighted = (),
    model: str = EMBEDDED,
    **options: Any,
) -> str:
    """Draw each prompt from each seed; the job's id.

    Arguments:
        options: `steps`, `guidance_scale`, `negative_prompt` and `sampler`, as `veneer generate` has them.

    Raises:
        StudioError: nothing or too much to draw, or an adapter or option that cannot be.
    """
    asked = [(prompt, seed) for prompt in checked_prompts(prompts) for seed in checked_seeds(seeds)]
    cells = [{"prompt": prompt, "seed": seed} for prompt, seed in asked]
    return store.submit(ws, user, "draw", request(ws, user, cells, adapters, model, options))


def compare(
    ws: Workspace,
    user: str,
    prompt: str,
    seed: int,
    sides: Sequence[Weighted],
    model: str = EMBEDDED,
    labels: Sequence[str] = (),
    **options: Any,
) -> str:
    """Draw one prompt from one seed once for each side; the job's id. A side without adapters is the bare model."""
    if not 2 <= len(sides) <= 8:
        raise StudioError("A comparison has two to eight sides. Choose what to compare.")
    pairs = [dict(side.items() if isinstance(side, Mapping) else side) for side in sides]
    used = list(dict.fromkeys(reference for side in pairs for reference in side))
    (words,), (number,) = checked_prompts([prompt]), checked_seeds([seed])
    cells = [
        {
            "prompt": words,
            "seed": number,
            "weights": [references.checked_weight(side.get(reference, 0.0)) for reference in used],
            "label": str(labels[index])[:80] if index < len(labels) else "",
            "column": index,
        }
        for index, side in enumerate(pairs)
    ]
    return store.submit(
        ws, user, "compare", request(ws, user, cells, [(reference, 1.0) for reference in used], model, options)
    )


def pictures(ws: Workspace, user: str, job: str) -> list[Cell]:
    """What a job of pictures was asked for, with what is drawn so far."""
    found = store.owned(ws, user, job, position=False)
    return [
        Cell(
            cell["prompt"],
            cell["seed"],
            path if (path := found.out / cell["file"]).is_file() else None,
            cell.get("label", ""),
            cell.get("row", 0),
            cell.get("column", 0),
            tuple(cell.get("weights", ())),
            cell.get("combine", False),
        )
        for cell in found.arguments.get("cells", ())
    ]


# -------------------------------------------------------------------------------- what every job of pictures needs


def request(
    ws: Workspace,
    user: str,
    cells: list[dict[str, Any]],
    adapters: Weighted,
    model: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of a job that draws cells, checked."""
    if not cells or len(cells) > MAX_PICTURES:
        raise StudioError(f"{len(cells)} pictures were asked for. Choose 1 to {MAX_PICTURES}.")
    found = references.inputs(ws, user, adapters)
    if len(found) > MAX_ADAPTERS:
        raise StudioError(f"{len(found)} adapters at once are too many: choose up to {MAX_ADAPTERS}.")
    return {
        "model": models.source_of(ws, model),
        "adapters": found,
        "options": _checked_options(options),
        "cells": [{"file": f"{number:04d}.png", **cell} for number, cell in enumerate(cells)],
    }


def checked_prompts(prompts: Sequence[str]) -> list[str]:
    words = [" ".join(str(prompt).split()) for prompt in prompts]
    if not any(words) or any(len(prompt) > 1000 for prompt in words):
        raise StudioError("Type what shall be drawn, in at most 1000 letters.")
    return [prompt for prompt in words if prompt]


def checked_seeds(seeds: Sequence[Any]) -> list[int]:
    if not seeds or not all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds):
        raise StudioError("Seeds are whole numbers from 0, such as 0, 1, 2. Type at least one.")
    return list(seeds)


def _checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    steps, scale = options.get("steps", 20), options.get("guidance_scale")
    negative, sampler = options.get("negative_prompt", ""), options.get("sampler", "dpm++")
    unknown = sorted(options.keys() - {"steps", "guidance_scale", "negative_prompt", "sampler"})
    if unknown:
        raise StudioError(f"Pictures have no setting {', '.join(unknown)}.")
    if type(steps) is not int or not 1 <= steps <= 200:
        raise StudioError("The number of steps is a whole number from 1 to 200; 20 is usual.")
    if scale is not None and not (isinstance(scale, (int, float)) and 0 <= scale <= 50):
        raise StudioError("Guidance is a number from 0 to 50; leave it empty for the model's own.")
    if sampler not in SAMPLERS:
        raise StudioError(f"{sampler!r} is no sampler. Choose one of {', '.join(SAMPLERS)}.")
    if not isinstance(negative, str) or len(negative) > 1000:
        raise StudioError("What to keep away from is a text of at most 1000 letters.")
    return {"steps": steps, "guidance_scale": scale, "negative_prompt": negative, "sampler": sampler}
