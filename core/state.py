"""What is switched on: the one home of activation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import MergedError

if TYPE_CHECKING:
    from .config import PeftConfig
    from .replicate import Replication
    from .rows import Rows
    from .train import TrainedBias

Names = tuple[str, ...]


class State:
    """What is switched on: one object per model, shared by all its layers.

    Activity says nothing about gradients; `trainable` says which adapters may have them, and `train.py` turns both
    into `requires_grad`.
    """

    def __init__(self) -> None:
        self.active: Names = ()
        self.enabled = True
        self.rows: Rows | None = None
        """Which adapter each row of the batch runs instead of the active ones, while a mixed batch is on."""
        self.running: Names = ()
        """The adapters that the model's output shows, in order: the merged ones, else the rows' or those active, while
        enabled."""
        self.plan: Names | None = ()
        """What all layers run: these adapters in this order, or None if it differs by row."""
        self.merged: Names = ()
        self.configs: dict[str, PeftConfig] = {}
        self.trainable: set[str] = set()
        self.biases: dict[str, dict[str, TrainedBias]] = {}
        """Base biases that an adapter trains along, by adapter name."""
        self.replication: Replication | None = None
        """The layers that the model has more of than its own, for `layer_replication`."""
        self._recent: set[str] = set()

    def choose(self, active: Names, enabled: bool = True) -> None:
        """Run exactly these adapters.

        Raises:
            MergedError: some are merged into the weights, where no switch reaches them.
        """
        if self.merged and (active, enabled) != (self.active, self.enabled):
            raise MergedError(
                f"adapters {list(self.merged)} are merged into the base weights: call unmerge_adapter() before "
                "changing which adapters are active"
            )
        if active != self.active:
            self._recent.clear()
        self.active, self.enabled = active, enabled
        self._settle()

    def cast(self, rows: Rows | None) -> Rows | None:
        """Run these rows instead of the active adapters, or with None those again. Returns what was cast before.

        Raises:
            MergedError: adapters are merged, so that no row is without them.
        """
        if self.merged and rows is not None:
            raise MergedError(
                f"adapters {list(self.merged)} are merged into the base weights: call unmerge_adapter() before running "
                "a mixed batch"
            )
        before, self.rows = self.rows, rows
        if rows is not None:
            self._recent.update(rows.adapters)
        self._settle()
        return before

    def merge(self, names: Names) -> None:
        """Exactly these are in the weights: while there are any, they and no others run."""
        self.merged = names
        self._settle()

    def forget(self, name: str) -> None:
        """An adapter is gone."""
        self.trainable.discard(name)
        self._recent.discard(name)
        del self.configs[name]

    @property
    def learning(self) -> set[str]:
        """The adapters whose parameters require grad.

        Those that rows have named do so until others are activated: a backward pass comes after the forward pass that
        named them.
        """
        shown = self.merged or ((*self.active, *self._recent) if self.enabled else ())
        return self.trainable.intersection(shown)

    def _settle(self) -> None:
        active = self.active if self.rows is None else self.rows.adapters
        self.running = self.merged or (active if self.enabled else ())
        self.plan = None if self.running and self.rows is not None and self.rows.mixed else self.running
