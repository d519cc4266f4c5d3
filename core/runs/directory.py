"""A run is a directory: its settings, metrics, checkpoints, and in the end its adapter.

config.yaml                 the settings; a rerun must agree with them
metrics.jsonl               one line a step
evaluations.jsonl           one line a held-out evaluation, of runs that have them
samples/step-000100/        what was drawn or written after those steps, likewise
checkpoints/step-000100/    adapter, optimizer, schedule: whole or not there at all
finished.json               how many steps the finished adapter has learnt

The finished adapter lies beside them, in the form of its front end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..atomic import atomic_folder, remove_leftovers
from ..files import write_text
from .config import RunConfig, differing_fields
from .events import Evaluation, Event, Step
from .followers import EventFile
from .settings import ConfigError, plain, to_yaml


class RunDirectory:
    """products: names that a finished adapter has in it, by which a directory without settings is told."""

    def __init__(self, root: Path, products: Iterable[str] = ()):
        self.root, self._products = Path(root), tuple(products)
        self.samples = self.root / "samples"
        self.checkpoints = self.root / "checkpoints"
        self.logs = (
            EventFile(self.root / "metrics.jsonl", Step),
            EventFile(self.root / "evaluations.jsonl", Evaluation),
        )
        self._config = self.root / "config.yaml"
        self._finished = self.root / "finished.json"

    def check(self, config: RunConfig) -> None:
        """Refuse to mix two recipes, or to write among files that are not a run's. Writes nothing."""
        if self._config.exists():
            import yaml

            before = yaml.safe_load(self._config.read_text())
            differing = differing_fields(before, plain(config), config.may_change())
            if differing:
                raise ConfigError(
                    f"{self.root} holds a run with other settings ({'; '.join(differing)}); "
                    "use the same settings to resume it, or another output_dir"
                )
        elif any((self.root / name).exists() for name in (*self._products, "checkpoints", "metrics.jsonl")):
            raise ConfigError(f"{self.root} holds an adapter or a run without config.yaml; use another output_dir")
        steps = max(self.finished_step() or 0, self.newest_step() or 0)
        if config.max_train_steps < steps:
            raise ConfigError(
                f"max_train_steps={config.max_train_steps}, but {self.root} has done {steps} steps already; "
                "give at least as many, or use another output_dir"
            )

    def log(self, event: Event) -> None:
        """Append what happened to the files that keep it."""
        for log in self.logs:
            log.write(event)

    @contextmanager
    def opened(self, config: RunConfig) -> Iterator[None]:
        """Hold the directory for this process and store the settings; half-written leftovers are removed."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as lock:
            _lock(lock, self.root)
            for folder in (self.root, self.checkpoints):
                remove_leftovers(folder)
            write_text(self._config, to_yaml(config))
            yield

    # ---------------------------------------------------------------- checkpoints

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint, None before the first."""
        steps = [int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*")]
        return max(steps, default=None)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    @contextmanager
    def new_checkpoint(self, step: int, keep: int) -> Iterator[Path]:
        """Fill the yielded folder; afterwards only the newest `keep` checkpoints remain."""
        with atomic_folder(self.checkpoint(step)) as folder:
            yield folder
        for old in sorted(self.checkpoints.glob("step-*"))[:-keep]:
            shutil.rmtree(old)

    def rewind(self, step: int) -> None:
        """Forget metrics and samples of steps that the newest checkpoint has not seen."""
        for log in self.logs:
            log.truncate(step)
        for folder in self.samples.glob("step-*"):
            if int(folder.name.removeprefix("step-")) > step:
                shutil.rmtree(folder)

    # ---------------------------------------------------------------- the end

    def finished_step(self) -> int | None:
        """How many steps the finished adapter has learnt, None while there is none."""
        return json.loads(self._finished.read_text())["step"] if self._finished.exists() else None

    def finish(self, step: int) -> None:
        write_text(self._finished, json.dumps({"step": step}))


def _lock(file: IO[str], root: Path) -> None:
    """One process a run. The lock dies with its process, so a killed run leaves nothing to clean up."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(f"another process is running in {root}") from None
