"""What a run will take, before it starts: as exact as headers and past runs allow, and saying which of the two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from ...core.errors import AdapterFileError
from ...core.header import read_header
from ...diffusion.base import BaseModel
from ...diffusion.families import EMBEDDED, EMBEDDED_PATH
from ..jobs.store import everything
from ..jobs.task import spoken
from ..workspace import Workspace
from .recipes import has


@dataclass(frozen=True)
class Estimate:
    """Texts for people, and what they rest on."""

    time: str
    memory: str
    disk: str
    basis: str
    seconds: float
    bytes_of_memory: float
    bytes_on_disk: float


_BYTES = {"no": 4, "fp16": 2, "bf16": 2}
_FLOPS = 1.5e10, 2e13
"""Floating point operations a second that small batches get out of two cores, and out of a usual GPU."""


def estimate(settings: Mapping[str, Any], pictures: int, ws: Workspace | None = None) -> Estimate:
    """What a run of these settings takes.

    Arguments:
        settings: as `recipes.build` makes them.
        ws: where to look for earlier runs of the same model, whose pace is worth more than any formula.
    """
    size = _Size.of(settings)
    measured = None if ws is None else _pace(ws, settings)
    step = measured if measured is not None else _step(settings, size)
    seconds = step * settings["max_train_steps"] + _drawn(settings, pictures) * step * 0.4
    memory = size.weights * _BYTES[settings["mixed_precision"]] + size.trained * 16 + _activations(settings, size)
    kept = min(settings["checkpoints_total_limit"], 1 + settings["max_train_steps"] // settings["checkpointing_steps"])
    disk = size.trained * (12 * kept + 8) + 5e4 * _drawn(settings, pictures)
    basis = "the pace of earlier runs here" if measured is not None else "a rule of thumb; within a factor of three"
    return Estimate(f"about {spoken(seconds)}", _size(memory), _size(disk), basis, seconds, memory, disk)


@dataclass(frozen=True)
class _Size:
    """Numbers of parameters, and the side of the pictures."""

    weights: float
    trained: float
    side: int

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> _Size:
        shapes = _shapes(settings["model"])
        weights = sum(prod(shape) for tables in shapes.values() for shape in tables)
        trained = sum(
            _adapter(shapes.get(part, []), settings[part])
            for part in ("unet", "text_encoder")
            if settings[part]["method"] != "none"
        )
        return cls(weights, trained, settings["resolution"] or (64 if settings["model"] == EMBEDDED else 512))


def _adapter(shapes: list[tuple[int, ...]], options: Mapping[str, Any]) -> float:
    """Trained numbers: attention's projections are about a third of the matrices, all of them with the other two."""
    share = min(1.0, 0.35 + 0.25 * options["feed_forward"] + 0.4 * options["conv"])
    if options["method"] == "full":
        return share * sum(prod(shape) for shape in shapes)
    pairs = sum(shape[0] + prod(shape[1:]) for shape in shapes if len(shape) > 1)
    factors = {"loha": 2.0, "lokr": 0.1}.get(options["method"], 1.0)
    rank = options["rank"] if has(options["method"], "rank") and options["method"] != "vera" else 1
    return share * pairs * rank * factors


def _shapes(model: str) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of a model's tensors by component, from headers; of Stable Diffusion 1's size where there are none."""
    folder = EMBEDDED_PATH if model == EMBEDDED else Path(model)
    try:
        BaseModel(str(folder))
    except AdapterFileError:
        return {"unet": [(1280, 1280)] * 520, "text_encoder": [(768, 768)] * 200}
    found: dict[str, list[tuple[int, ...]]] = {}
    for file in folder.glob("*/*.safetensors"):
        tensors = read_header(file).tensors.values()
        found.setdefault(file.parent.name, []).extend(info.shape for info in tensors)
    return found


def _pace(ws: Workspace, settings: Mapping[str, Any]) -> float | None:
    """Seconds a step, from the newest runs of the same model and batch that have come far enough to tell."""
    alike = [
        job
        for job in everything(ws)
        if job.kind == "train" and all(job.arguments["config"].get(name) == settings[name] for name in _ALIKE)
    ]
    times: list[float] = []
    for job in sorted(alike, key=lambda job: -job.created)[:5]:
        try:
            lines = (job.out / "metrics.jsonl").read_text().splitlines()[1:200]  # the first step warms up
        except FileNotFoundError:
            continue
        times += [json.loads(line)["seconds"] for line in lines if line.endswith("}")]
    return median(times) if len(times) >= 5 else None


_ALIKE = ("model", "resolution", "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")


def _step(settings: Mapping[str, Any], size: _Size) -> float:
    """Six operations a weight and latent position, twice with pictures of the class; at least what overhead takes."""
    from ..jobs.supervisor import device

    batch = (
        settings["train_batch_size"] * settings["gradient_accumulation_steps"] * (1 + bool(settings["class_prompt"]))
    )
    positions = (size.side / 8) ** 2 / 4
    work = 6 * size.weights * positions * batch * (1.4 if settings["gradient_checkpointing"] else 1.0)
    on_cpu, on_gpu = _FLOPS
    return max(0.05, work / (on_gpu if device() == "cuda" else on_cpu))


def _drawn(settings: Mapping[str, Any], pictures: int) -> float:
    """Pictures that are drawn along the way, in units of 20 denoising steps."""
    every = settings["sample_every"] or settings["max_train_steps"]
    times = 1 + settings["max_train_steps"] / every
    samples = times * len(settings["sample_seeds"]) * max(1, len(settings["sample_prompts"]))
    of_class = settings["num_class_images"] if settings["class_prompt"] else 0
    return (samples + of_class) * settings["sample_steps"] / 20


def _activations(settings: Mapping[str, Any], size: _Size) -> float:
    """Measured on Stable Diffusion 1 at 512 pixels: about 5 GB a picture in float32, a third of it recomputing."""
    batch = settings["train_batch_size"] * (1 + bool(settings["class_prompt"]))
    share = 0.35 if settings["gradient_checkpointing"] else 1.0
    width = min(1.0, size.weights / 8.6e8)
    return 5e9 * batch * share * (size.side / 512) ** 2 * width * _BYTES[settings["mixed_precision"]] / 4 + 6e8


def _size(count: float) -> str:
    return f"about {count / 1e9:.1f} GB" if count >= 1e9 else f"about {max(1, round(count / 1e6))} MB"
