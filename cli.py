"""The `veneer` command. A subcommand is one line of `COMMANDS`; the work is done by the package it names.

This file imports neither torch nor a model library: help and usage errors come at once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from . import __version__


@dataclass(frozen=True)
class Command:
    """Where a subcommand lives: `module` defines the config dataclass `config` and the function `run(config)`."""

    module: str
    config: str
    run: str
    help: str


COMMANDS = {
    "demo": Command(".diffusion.demo", "DemoConfig", "demo", "learn a subject and a style, blend them: see it all work"),
    "dreambooth": Command(".diffusion.dreambooth", "DreamBoothConfig", "main", "teach a model a subject from a few images"),
    "generate": Command(".diffusion.generate", "GenerateConfig", "generate", "images from prompts, with weighted adapters"),
    "blend": Command(".diffusion.blend", "BlendConfig", "blend", "several adapters into one, with a preview"),
    "inspect": Command(".diffusion.inspect", "InspectConfig", "inspect", "what an adapter file or folder holds"),
}
