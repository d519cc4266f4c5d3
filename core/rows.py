"""Mixed batches: which adapter each row of a batch runs.

A model is called with one batch, but its layers may see the rows otherwise: repeated for beams, doubled for guidance,
flattened into tokens, or as one row that is broadcast. `Rows` knows these ways, and refuses what it cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .state import State

BASE = "__base__"
"""The name of no adapter: a row that runs the base model."""


class Groups:
    """The rows of a tensor by the adapter that runs them."""

    def __init__(self, numbers: Tensor, names: tuple[str, ...], device: torch.device):
        # numbers: for every row the place of its adapter in `names`
        self.count, self.names, self.numbers = len(numbers), names, numbers.to(device)
        order = numbers.argsort(stable=True)
        starts = [0, *numbers.bincount(minlength=len(names)).cumsum(0).tolist()]
        self.parts: list[tuple[str, slice | Tensor]] = []
        for name, start, end in zip(names, starts, starts[1:], strict=False):
            if end > start:
                rows = order[start:end]
                first, last = int(rows[0]), int(rows[-1])
                together = last - first + 1 == len(rows)
                self.parts.append((name, slice(first, last + 1) if together else rows.to(device)))
        in_order = bool((order.diff() == 1).all())
        self._back = None if in_order else order.argsort().to(device)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors of `parts`, one for each group, as one with the rows in their old order."""
        whole = torch.cat(tuple(parts))
        return whole if self._back is None else whole.index_select(0, self._back)


def take(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """Some rows: a view where they lie together."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


class Layout:
    """Which adapter runs each row of tensors of one length."""

    def __init__(self, names: tuple[str, ...], numbers: Tensor):
        self.names, self.numbers = names, numbers
        self._groups: dict[tuple[tuple[str, ...], torch.device], Groups] = {}

    def groups(self, here: tuple[str, ...], device: torch.device) -> Groups:
        """For a layer that has the adapters `here`; all other rows are the base's, which come first."""
        found = self._groups.get((here, device))
        if found is None:
            places = torch.tensor([here.index(n) + 1 if n in here else 0 for n in self.names])
            found = self._groups[here, device] = Groups(places[self.numbers], (BASE, *here), device)
        return found


class Rows:
    """One adapter for each row of a batch.

    Arguments:
        names: an adapter for every row, or "__base__".
        each: layers may also see every row this many times in place, as with beams: a a b b.
        tiled: layers may also see the whole batch this many times, as with guidance: a b a b.
    """

    def __init__(self, names: Sequence[str], each: int = 1, tiled: int = 1):
        if isinstance(names, str) or not all(isinstance(n, str) for n in names) or not names:
            raise TypeError(f"adapter names of a batch are a list with one name for each row, not {names!r}")
        if min(each, tiled) < 1 or (each > 1 and tiled > 1):
            raise ValueError(f"each={each} and tiled={tiled}: both are at least 1, and only one of them is more")
        self.names = tuple(names)
        distinct = tuple(dict.fromkeys(names))
        self.adapters = tuple(n for n in distinct if n != BASE)
        self.mixed = len(distinct) > 1
        numbers = torch.tensor([distinct.index(n) for n in names])
        self._layouts = {len(names): Layout(distinct, numbers)}
        spread = numbers.repeat_interleave(each) if each > 1 else numbers.repeat(tiled)
        self._layouts.setdefault(len(spread), Layout(distinct, spread))
        self._flattened: dict[int, Layout] = {}
        self.batch = len(names)
        """Rows of the batch that the model was last called with."""

    def layout(self, x: Tensor, layer: str) -> Layout:
        """How the rows of a layer's input `x` are to be understood; `layer` names it in errors.

        Raises:
            ValueError: they can't be told apart.
        """
        if "experts" in layer.split("."):  # tokens chosen by a router, of any number
            raise ValueError(
                f"{layer} is one of a layer of experts, which see tokens without knowing their rows: in a mixed batch "
                "it cannot tell which adapter is meant. Leave experts out of target_modules, or run one batch for "
                "each adapter"
            )
        count = len(x) if x.ndim else 0
        found = self._layouts.get(count) or (self._flattened.get(count) if x.ndim <= 2 else None)
        if found is None:
            raise ValueError(
                f"{layer or 'a layer'} was called with an input of shape {tuple(x.shape)} in a mixed batch of "
                f"{len(self.names)} rows, and which adapter its {count} rows belong to cannot be told. Name an adapter "
                "for each row that the model sees (each= and tiled= of `rows` repeat them)"
            )
        return found

    def see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model runs: check that its batch has these rows, and learn how they look as flattened tokens."""
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim]
        fitting = [t for t in tensors if len(t) in self._layouts]
        if tensors and not fitting:
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(self.names)} and "
                f"{len(tensors[0])} respectively. Give one adapter for each row, '__base__' for the base model"
            )
        if fitting:
            self.batch = len(next((t for t in fitting if t.ndim > 1), fitting[0]))
        for tensor in fitting:
            if tensor.ndim in (2, 3) and tensor.numel() and tensor.shape[1] > 1:
                layout, tokens = self._layouts[len(tensor)], tensor.shape[1]
                if len(tensor) * tokens not in self._flattened:
                    spread = Layout(layout.names, layout.numbers.repeat_interleave(tokens))
                    self._flattened[len(tensor) * tokens] = spread


@contextmanager
def cast(model: nn.Module, state: State, rows: Rows) -> Iterator[None]:
    """Run these rows inside, and in whatever is recomputed later of what ran inside."""
    before = state.cast(rows)
    hook = model.register_forward_pre_hook(rows.see, with_kwargs=True)
    checkpointed = _checkpointed(model)
    for module, checkpoint in checkpointed:
        module._gradient_checkpointing_func = partial(_remembered, checkpoint, state, rows)
    try:
        yield
    finally:
        for module, checkpoint in checkpointed:
            module._gradient_checkpointing_func = checkpoint
        hook.remove()
        state.cast(before)


def _checkpointed(model: nn.Module) -> list[tuple[Any, Callable[..., Any]]]:
    """The modules of a transformers model that recompute their activations, and how."""
    if not (model.training and torch.is_grad_enabled()):
        return []
    found = ((m, vars(m).get("_gradient_checkpointing_func")) for m in model.modules())
    return [(m, checkpoint) for m, checkpoint in found if checkpoint is not None]


def _remembered(
    checkpoint: Callable[..., Any], state: State, rows: Rows, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Checkpoint a function so that the backward pass, which may come after the rows are gone, recomputes it with
    them."""

    def with_rows(*args: Any, **kwargs: Any) -> Any:
        before = state.cast(rows)
        try:
            return function(*args, **kwargs)
        finally:
            state.cast(before)

    return checkpoint(with_rows, *args, **kwargs)
