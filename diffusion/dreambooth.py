"""DreamBooth from a config to files: prepare, train, sample, save; each step of it an event.

for event in DreamBooth(config).run():
    print(event)
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .config import AdapterOptions, ConfigError, DreamBoothConfig
from .events import Done, Event, ProgressBar, Stopped
from .place import Place
from .requests import Requests
from .run_directory import RunDirectory

__all__ = ["AdapterOptions", "ConfigError", "DreamBooth", "DreamBoothConfig", "main"]


def main(config: DreamBoothConfig) -> None:
    """Run with a progress bar on the terminal; exits with 130 when asked to stop before the end."""
    bar = ProgressBar(disable=not Place(config.device == "cpu").main)
    if isinstance(bar.follow(DreamBooth(config).run()), Stopped):
        raise SystemExit(130)


class DreamBooth:
    """One run of one config. `run()` trains and tells; the other methods ask something of it, from a signal or another
    thread, and are heeded at the end of the present step. None of them changes what is learnt."""

    def __init__(self, config: DreamBoothConfig):
        self.config = config
        self.directory = RunDirectory(Path(config.output_dir))
        self._requests = Requests()

    def stop(self) -> None:
        """Finish the present step, save a checkpoint, and end. Running again goes on from there."""
        self._requests.stop.set()

    def save(self) -> None:
        """Save a checkpoint after the present step, and go on."""
        self._requests.save.set()

    def sample(self) -> None:
        """Draw the samples after the present step, and go on."""
        self._requests.sample.set()

    def run(self) -> Iterator[Event]:
        """Train until `max_train_steps`, from wherever this directory stands. Ctrl-C and SIGTERM act as `stop()`.

        Raises `ConfigError` or `DataError` before anything is written if it cannot work, and `TrainingError` if the
        numbers break. Of several processes only the first tells anything.
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
                self.directory.metrics.write(event)
                yield event

    def _events(self, place: Place) -> Iterator[Event]:
        from .prepare import prepare  # the model libraries: not before the settings are known to be sound
        from .session import Session

        prepared = yield from prepare(self.config, place)
        with _on_signal(self.stop):
            yield from Session(self.config, self.directory, prepared, place, self._requests).events()


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
