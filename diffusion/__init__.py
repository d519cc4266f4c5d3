"""Diffusion pipelines: DreamBooth training, drawing, and adapters on pipelines.

The names below load on first use: importing this package imports no model library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import face

if TYPE_CHECKING:
    from .config import AdapterOptions, ConfigError, DreamBoothConfig
    from .convert import ConvertConfig, convert_adapter
    from .dreambooth import DreamBooth
    from .events import Checkpoint, Done, Event, Notice, Plan, Progress, ProgressBar, Sample, Step, Stopped
    from .families import family_of, load_pipeline
    from .grid import contact_sheet
    from .images import DataError
    from .inspect import inspect_adapter
    from .pipeline import (
        LoadReport,
        adapted_models,
        detach,
        load_adapter,
        merge,
        read_adapter,
        remove_adapter,
        save_adapter,
        set_weights,
    )
    from .sample import generate_each
    from .trainer import TrainingError

_HOME = {
    "AdapterOptions": "config",
    "Checkpoint": "events",
    "ConfigError": "config",
    "ConvertConfig": "convert",
    "DataError": "images",
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
    "convert_adapter": "convert",
    "detach": "pipeline",
    "family_of": "families",
    "generate_each": "sample",
    "inspect_adapter": "inspect",
    "LoadReport": "pipeline",
    "load_adapter": "pipeline",
    "load_pipeline": "families",
    "merge": "pipeline",
    "read_adapter": "pipeline",
    "remove_adapter": "pipeline",
    "save_adapter": "pipeline",
    "set_weights": "pipeline",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = face(__name__, _HOME)
