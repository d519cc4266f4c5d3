"""Diffusion pipelines: DreamBooth training, drawing, and adapters on pipelines.

The names below load on first use: importing this package imports no model library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import face

if TYPE_CHECKING:
    from ..core.errors import DataError
    from ..core.runs.events import Checkpoint, Done, Event, Notice, Progress, Step, Stopped
    from ..core.runs.followers import ProgressBar
    from ..core.runs.settings import ConfigError
    from ..core.runs.trainer import TrainingError
    from .config import AdapterOptions, DreamBoothConfig
    from .convert import ConvertConfig, convert_adapter
    from .dreambooth import DreamBooth
    from .events import Plan, Sample
    from .families import family_of, load_pipeline
    from .grid import contact_sheet
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

_HOME = {
    "AdapterOptions": "config",
    "Checkpoint": ".core.runs.events",
    "ConfigError": ".core.runs.settings",
    "ConvertConfig": "convert",
    "DataError": ".core.errors",
    "Done": ".core.runs.events",
    "DreamBooth": "dreambooth",
    "DreamBoothConfig": "config",
    "Event": ".core.runs.events",
    "Notice": ".core.runs.events",
    "Plan": "events",
    "Progress": ".core.runs.events",
    "ProgressBar": ".core.runs.followers",
    "Sample": "events",
    "Step": ".core.runs.events",
    "Stopped": ".core.runs.events",
    "TrainingError": ".core.runs.trainer",
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
