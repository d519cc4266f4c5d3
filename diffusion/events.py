"""What a DreamBooth run tells beyond any other: its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..core.runs import events
from ..core.runs.events import Event


@dataclass(frozen=True, kw_only=True)
class Plan(events.Plan):
    """Sent once, before the first step: what is going to be trained, on what, from where to where."""

    family: str
    prediction_type: str
    resolution: int
    instance_images: int
    class_images: int

    def about(self) -> str:
        images = f"{self.instance_images} images, {self.class_images} of the class"
        return f"{self.family}, {self.prediction_type}; {images}"


@dataclass(frozen=True)
class Sample(Event):
    """Sample images were drawn after `step` steps."""

    step: int
    sheet: Path
    """The contact sheet of all samples so far."""
    images: tuple[Path, ...] = ()
