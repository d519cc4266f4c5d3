"""Supervised fine-tuning from a config to files: a run whose events are steps, held-out losses and answers.

for event in FineTuning(config).run():
    print(event)
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from ..core.runs.events import Event
from ..core.runs.place import Place
from ..core.runs.run import Run
from .config import AdapterOptions, TextConfig

if TYPE_CHECKING:
    from ..core.runs.session import Session

__all__ = ["AdapterOptions", "FineTuning", "TextConfig", "main"]


def main(config: TextConfig) -> None:
    """Run with a progress bar on the terminal; exits with 130 when asked to stop before the end."""
    FineTuning(config).follow()


class FineTuning(Run):
    """One fine-tuning run of one config."""

    products = ("adapter_config.json", "adapter_model.safetensors")

    def __init__(self, config: TextConfig):
        super().__init__(config)
        self.text = config

    def prepare(self, place: Place) -> Generator[Event, None, Session]:
        from .prepare import prepare

        return (yield from prepare(self.text, self.directory, place, self.requests))
