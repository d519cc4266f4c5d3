"""Diffusion pipelines: DreamBooth training, drawing, and adapters on pipelines.

The names below load on first use: importing this package imports no model library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import AdapterOptions, ConfigError, DreamBoothConfig
    from .data import DataError
    from .dreambooth import DreamBooth
    from .events import Checkpoint, Done, Event, Notice, Plan, Progress, ProgressBar, Sample, Step, Stopped
    from .families import family_of, load_pipeline
    from .grid import contact_sheet
    from .pipeline import adapted_models, detach, load_adapter, merge, read_adapter, remove_adapter, set_weights
    from .sample import generate_each
    from .trainer import TrainingError

_HOME = {
    "AdapterOptions": "config",
    "Checkpoint": "events",
    "ConfigError": "config",
    "DataError": "data",
    "Done": "events",
    "DreamBooth": "dreambooth",
    "DreamBoothConfig": "config",
    "Event": "events",
    "Notice": "events",
    "Plan": "events",
    "Progress": "events",
    "ProgressBar": "events",
    "Sample": "events",
    "Step": "events",
    "Stopped": "events",
    "TrainingError": "trainer",
    "adapted_models": "pipeline",
    "contact_sheet": "grid",
    "detach": "pipeline",
    "family_of": "families",
    "generate_each": "sample",
    "load_adapter": "pipeline",
    "load_pipeline": "families",
    "merge": "pipeline",
    "read_adapter": "pipeline",
    "remove_adapter": "pipeline",
    "set_weights": "pipeline",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
