"""Depth by repetition: `layer_replication` builds a deeper model out of a model's own layers, which share weights.

With [[0, 4], [2, 5]] layers 0 to 3 are followed by 2 to 4: seven layers from five (as in "SOLAR", Kim et al. 2023,
arXiv:2312.15166). The copies hold the very parameters of the originals, so the base grows by nothing, and each has
adapters of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from .config import PeftConfig
from .state import State


class Replication:
    """A model's list of layers, replaced by a longer one until `undo`."""

    def __init__(self, model: nn.Module, ranges: Sequence[Sequence[int]]):
        self.ranges = [list(r) for r in ranges]
        self.config: Any = getattr(model, "config", None)
        self.parent, self.attribute = _layers_of(model, self.config)
        self.original: nn.ModuleList = getattr(self.parent, self.attribute)
        order = _order(self.ranges, len(self.original))
        setattr(self.parent, self.attribute, nn.ModuleList(self._copy(i, place) for place, i in enumerate(order)))
        self.before = self._describe(order)

    def _copy(self, index: int, place: int) -> nn.Module:
        layer = self.original[index]
        shared = [*layer.parameters(), *layer.buffers(), self.config]
        twin = copy.deepcopy(layer, {id(one): one for one in shared})
        module: Any
        for module in twin.modules():
            if hasattr(module, "layer_idx"):  # by which transformers finds a layer's cache
                module.layer_idx = place
        return twin

    def _describe(self, order: list[int]) -> dict[str, Any]:
        """Tell the model's config of the new depth; returns what it said before."""
        before: dict[str, Any] = {}
        if isinstance(getattr(self.config, "num_hidden_layers", None), int):
            before["num_hidden_layers"] = self.config.num_hidden_layers
        kinds = getattr(self.config, "layer_types", None)
        if kinds and len(kinds) == len(self.original):
            before["layer_types"] = kinds
            self.config.layer_types = [kinds[i] for i in order]
        if "num_hidden_layers" in before:
            self.config.num_hidden_layers = len(order)
        return before

    def undo(self) -> None:
        """Put the model's own layers back."""
        setattr(self.parent, self.attribute, self.original)
        for name, value in self.before.items():
            setattr(self.config, name, value)


@contextmanager
def replicated(model: nn.Module, config: PeftConfig, state: State) -> Iterator[None]:
    """Give the model the layers that a new adapter needs; they go again if attaching it fails inside.

    Raises:
        ValueError: the adapters of the model need another depth, or the model has no one list of layers.
    """
    ranges = getattr(config, "layer_replication", None)
    ranges = [list(r) for r in ranges] if ranges else None
    before = state.replication
    current = before.ranges if before else None
    if ranges == current:
        yield
        return
    if ranges is None or state.configs:
        raise ValueError(
            f"layer_replication={ranges}, but the adapters that the model has are made for {current}: all adapters of "
            "a model need the same layers"
        )
    state.replication = Replication(model, ranges)
    try:
        yield
    except Exception:
        restore_depth(state)
        raise


def restore_depth(state: State) -> None:
    """Put the model's own layers back, once no adapter is left."""
    if state.replication is not None:
        state.replication.undo()
        state.replication = None


def _order(ranges: list[list[int]], length: int) -> list[int]:
    """Indices of the layers, in their new order."""
    for found in ranges:
        if len(found) != 2 or not 0 <= found[0] < found[1] <= length:
            raise ValueError(
                f"layer_replication: {found} is no range of this model's layers: give [start, end] with "
                f"0 <= start < end <= {length}"
            )
    return [i for start, end in ranges for i in range(start, end)]


def _layers_of(model: nn.Module, config: Any) -> tuple[nn.Module, str]:
    """Who holds the model's list of layers, and under which name.

    It is the outermost list of two or more modules of one class; of several the one as long as the config says.
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        for name, child in module.named_children():
            alike = isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(m) for m in child}) == 1
            if alike and not any(f"{path}.".startswith(f"{outer}.") for outer in found):
                found[f"{path}.{name}".lstrip(".")] = module, name
    depth = getattr(config, "num_hidden_layers", None)
    if len(found) > 1 and isinstance(depth, int):
        found = {path: at for path, at in found.items() if len(getattr(*at)) == depth} or found
    if len(found) != 1:
        lists = f"several: {', '.join(found)}" if found else "none"
        raise ValueError(
            f"layer_replication needs a model with one list of layers, and {type(model).__name__} has {lists}"
        )
    return next(iter(found.values()))
