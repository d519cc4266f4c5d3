"""DreamBooth from a config to files: a run whose events are steps and pictures.

for event in DreamBooth(config).run():
    print(event)
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from ..core.runs.events import Event
from ..core.runs.place import Place
from ..core.runs.run import Run
from ..core.runs.settings import ConfigError
from .config import AdapterOptions, DreamBoothConfig

if TYPE_CHECKING:
    from ..core.runs.session import Session

__all__ = ["AdapterOptions", "ConfigError", "DreamBooth", "DreamBoothConfig", "main"]


def main(config: DreamBoothConfig) -> None:
    """Run with a progress bar on the terminal; exits with 130 when asked to stop before the end."""
    DreamBooth(config).follow()


class DreamBooth(Run):
    """One DreamBooth run of one config."""

    products = ("unet", "text_encoder")

    def __init__(self, config: DreamBoothConfig):
        super().__init__(config)
        self.dreambooth = config

    def prepare(self, place: Place) -> Generator[Event, None, Session]:
        from .prepare import prepare
        from .session import DreamBoothSession

        prepared = yield from prepare(self.dreambooth, place)
        return DreamBoothSession(self.dreambooth, self.directory, prepared, self.requests)
