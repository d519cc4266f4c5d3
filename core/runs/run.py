"""A training run from a config to files: check, prepare, train; each step of it an event.

for event in DreamBooth(config).run():
    print(event)
"""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .config import RunConfig
from .directory import RunDirectory
from .events import Done, Event, Stopped
from .followers import ProgressBar
from .place import Place
from .requests import Requests

if TYPE_CHECKING:
    from .session import Session


class Run(ABC):
    """One run of one config. `run()` trains and tells; the other methods ask something of it, from a signal or another
    thread, and are heeded at the end of the present step. None of them changes what is learnt."""

    products: ClassVar[tuple[str, ...]] = ()
    """Names of the finished adapter's files and folders in the run's directory."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.directory = RunDirectory(Path(config.output_dir), self.products)
        self.requests = Requests()

    @abstractmethod
    def prepare(self, place: Place) -> Generator[Event, None, Session]:
        """Everything before the first step. Model libraries are imported here: not before the settings are sound."""

    def stop(self) -> None:
        """Finish the present step, save a checkpoint, and end. Running again goes on from there."""
        self.requests.stop.set()

    def save(self) -> None:
        """Save a checkpoint after the present step, and go on."""
        self.requests.save.set()

    def sample(self) -> None:
        """Show what has been learnt after the present step, and go on."""
        self.requests.sample.set()

    def run(self) -> Iterator[Event]:
        """Train until `max_train_steps`, from wherever this directory stands. Ctrl-C and SIGTERM act as `stop()`.

        Raises `ConfigError` or the front end's data error before anything is written if it cannot work, and
        `TrainingError` if the numbers break. Of several processes only the first tells anything.
        """
        self.config.validate()
        self.directory.check(self.config)
        done = self.directory.finished_step()
        if done is not None and done >= self.config.max_train_steps:
            yield Done(done, self.directory.root)
            return
        place = Place(self.config.device == "cpu")
        if not place.main:
            for _ in self._events(place):
                pass
            return
        with self.directory.opened(self.config):
            for event in self._events(place):
                self.directory.log(event)
                yield event

    def _events(self, place: Place) -> Iterator[Event]:
        session = yield from self.prepare(place)
        with _on_signal(self.stop):
            yield from session.events()

    def follow(self) -> None:
        """Run with a progress bar on the terminal; exits with 130 when asked to stop before the end."""
        bar = ProgressBar(disable=not Place(self.config.device == "cpu").main)
        if isinstance(bar.follow(self.run()), Stopped):
            raise SystemExit(130)


@contextmanager
def _on_signal(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM calls `stop`; a second one acts as usual, for those who cannot wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        stop()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
