"""What can be asked of a training run while it goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Event


@dataclass(frozen=True)
class Requests:
    """Set from any thread or signal handler; the loop looks at them at the end of every step."""

    stop: Event = field(default_factory=Event)
    """Stays set: who was asked to stop does not go on."""
    save: Event = field(default_factory=Event)
    sample: Event = field(default_factory=Event)


def taken(request: Event) -> bool:
    """Whether it was asked, which is answered by doing it once."""
    asked = request.is_set()
    request.clear()
    return asked
