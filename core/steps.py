"""What a training loop calls around its optimizer, for methods that ask for more than a gradient.

    loss = loss_of(model(batch)) + penalty(model)
    loss.backward()
    optimizer.step()
    after_step(model, step)
    optimizer.zero_grad()

Each function takes a `PeftModel`, an `AdaptedModel`, or a model that was injected into, and does nothing for the
methods that ask for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .adapted import AdaptedModel
from .adapter import Adapter, by_class
from .handle import handle_of

TrainingState = dict[str, dict[str, dict[str, Tensor]]]
"""By adapter name, by layer path, by the method's own keys: tensors only, for `torch.save`."""


def penalty(model: nn.Module) -> Tensor | float:
    """What the running trainable adapters add to the loss: AdaLoRA's orthogonality, for example. 0.0 for none.

    A `PeftModel` adds it to `outputs.loss` itself, as in PEFT: a loop that takes its loss from there must not.
    """
    total: Tensor | float = 0.0
    for kind, group in _learning(model):
        term = kind.penalty(group)
        total = total if term is None else total + term
    return total


def after_step(model: nn.Module, step: int) -> None:
    """Let the running trainable adapters act on optimizer step number `step`, before the gradients are cleared."""
    for kind, group in _learning(model):
        kind.after_step(group, step)


def training_state(model: nn.Module) -> TrainingState:
    """What an exact resume needs beside the files of the adapters: optimizer and random states are the loop's."""
    handle = handle_of(model)
    found: TrainingState = {}
    for name in handle.configs:
        states = {path: state for path, adapter in handle.adapters(name).items() if (state := adapter.training_state())}
        if states:
            found[name] = states
    return found


def load_training_state(model: nn.Module, state: TrainingState) -> None:
    """Go on from `training_state`, after the tensors of the adapters' files were assigned.

    Raises:
        ValueError: an adapter or a layer that the model does not have; nothing has changed then.
    """
    handle = handle_of(model)
    adapters = {name: handle.adapters(name) for name in state}
    unknown = [f"{name}: {path}" for name, states in state.items() for path in states if path not in adapters[name]]
    if unknown:
        raise ValueError(f"the training state is of layers that this model has no adapter for: {unknown[:3]}")
    for name, states in state.items():
        for path, values in states.items():
            adapters[name][path].load_training_state(values)


def _learning(model: nn.Module) -> Iterator[tuple[type[Adapter], dict[str, Any]]]:
    """The adapters that are trained now, by name and class."""
    handle: AdaptedModel = handle_of(model)
    for name in handle.state.running:
        if name in handle.state.trainable:
            yield from by_class(handle.adapters(name)).items()
