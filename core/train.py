"""Trainability: the one home of `requires_grad`.

An adapter's parameters require grad when it is trainable *and* running. Which adapters are trainable is a fact of the
model's `State`, set when an adapter is added or loaded, or by `set_requires_grad`; switching adapters never changes it.
Only parameters of adapters whose outcome changes are touched, so flags set by hand elsewhere stay.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

from torch import nn

from .layer import AdaptedLayer
from .state import State
from .targets import walk

ParameterDicts = list[dict[str, Any]]
"""The dicts of modules that hold an adapter's parameters: they outlive the parameters, which loading replaces."""


def parameter_dicts(layers: Iterable[AdaptedLayer], name: str) -> ParameterDicts:
    """Where the parameters of adapter `name` live."""
    modules: list[nn.Module] = [layer.adapters[name] for layer in layers if name in layer.adapters]
    for module in modules:
        modules.extend(m for m in module._modules.values() if m is not None)
    return [m._parameters for m in dict.fromkeys(modules) if m._parameters]  # layers may share a module


_is_tensor = partial(operator.is_not, None)


class Trainability:
    """Keeps `requires_grad` in step with a `State`."""

    def __init__(self, state: State):
        self.state = state
        self.held: dict[str, ParameterDicts] = {}

    def track(self, name: str, held: ParameterDicts) -> None:
        """Take charge of an adapter's parameters, which are frozen until it learns."""
        self.held[name] = held
        self._set([name], name in self.state.learning)

    def refresh(self, name: str) -> None:
        """After some of its parameters were replaced by frozen ones."""
        if name in self.state.learning:
            self._set([name], True)

    @contextmanager
    def change(self):
        """Around any change of the state: afterwards, adapters whose outcome differs get it."""
        before = self.state.learning
        yield
        self.catch_up(before)

    def catch_up(self, before: set[str]) -> None:
        """After a change of the state, before which these adapters were learning."""
        after = self.state.learning
        self._set(before - after, False)
        self._set(after - before, True)

    def _set(self, names: Iterable[str], flag: bool) -> None:
        for name in names:
            for parameter in self.parameters(name):
                parameter.requires_grad = flag

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of one adapter, at the speed of C: a switch of adapters goes through thousands."""
        return filter(_is_tensor, chain.from_iterable(map(dict.values, self.held.get(name, ()))))


class TrainedBias:
    """A bias of the base model that an adapter trains along, and what it was before."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter, self.original = parameter, parameter.detach().clone()

    def restore(self) -> None:
        """Undo the training."""
        self.parameter.requires_grad = False
        self.parameter.data.copy_(self.original)


def trained_biases(model: nn.Module, layers: dict[str, AdaptedLayer], kind: str) -> dict[str, TrainedBias]:
    """The base biases that are trained along, under their names in PEFT's files.

    kind: "all" for every bias of the model, "lora_only" (or "oft_only") for those of the adapted layers.
    """
    modules = {f"{path}.base_layer": layer.base_layer for path, layer in layers.items()}
    if kind == "all":
        modules |= {path: p.module for path, p in walk(model).items() if not isinstance(p.module, AdaptedLayer)}
    return {
        f"{path}.bias": TrainedBias(b) for path, m in modules.items() if (b := m._parameters.get("bias")) is not None
    }
