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


def take(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """Some rows: a view where they lie together."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


class Groups:
    """The rows of a tensor by the adapter that runs them."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self.count, self.device = len(names), device
        self.places: dict[str, list[int]] = {}
        for place, name in enumerate(names):
            self.places.setdefault(name, []).append(place)
        self.parts = [(name, self._index(rows)) for name, rows in self.places.items()]
        order = [place for rows in self.places.values() for place in rows]
        self._back = None if order == sorted(order) else self._tensor(_inverse(order))
        self._segments: dict[tuple[int, int], Segments] = {}

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device)

    def _index(self, rows: list[int]) -> slice | Tensor:
        together = rows[-1] - rows[0] + 1 == len(rows)
        return slice(rows[0], rows[-1] + 1) if together else self._tensor(rows)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors of `parts`, one for each group, as one with the rows in their old order."""
        whole = torch.cat(tuple(parts))
        return whole if self._back is None else whole.index_select(0, self._back)

    def segments(self, tokens: int, rank: int) -> Segments:
        """The groups as segments of so many rows that the least is read: rows of `tokens` tokens, factors of `rank`."""
        found = self._segments.get((tokens, rank))
        if found is None:
            counts = [len(rows) for rows in self.places.values()]

            def cost(size: int) -> int:
                return sum(-(-count // size) for count in counts) * (size * tokens + rank)

            found = self._segments[tokens, rank] = Segments(self, min({1, *counts}, key=cost))
        return found


class Segments:
    """Groups of rows cut into segments of one size, the last of each group filled up with rows that count for nothing.

    owners: (segments,) the group that each belongs to, or None if they are the groups themselves.
    rows: (segments * size,) the rows in the order of the segments, or None if that is their order.
    back: (count,) where each row is among them, or None.
    """

    def __init__(self, groups: Groups, size: int):
        owners: list[int] = []
        order: list[int] = []
        for number, rows in enumerate(groups.places.values()):
            needed = -(-len(rows) // size)
            owners += [number] * needed
            order += rows + [rows[0]] * (needed * size - len(rows))
        self.number = len(owners)
        self.owners = None if owners == list(range(len(groups.places))) else groups._tensor(owners)
        in_order = order == list(range(groups.count))
        first = {row: place for place, row in reversed(list(enumerate(order)))}
        self.rows = None if in_order else groups._tensor(order)
        self.back = None if in_order else groups._tensor([first[row] for row in range(groups.count)])


def _inverse(order: Sequence[int]) -> list[int]:
    inverse = [0] * len(order)
    for place, row in enumerate(order):
        inverse[row] = place
    return inverse


class Layout:
    """Which adapter runs each row of tensors of one length."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self._groups: dict[tuple[tuple[str, ...], torch.device], Groups] = {}

    def groups(self, here: tuple[str, ...], device: torch.device) -> Groups:
        """For a layer that has the adapters `here`; all other rows are the base's."""
        found = self._groups.get((here, device))
        if found is None:
            names = [name if name in here else BASE for name in self.names]
            found = self._groups[here, device] = Groups(names, device)
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
        repeated = tuple(name for name in names for _ in range(each)) * tiled
        self._layouts = {len(rows): Layout(rows) for rows in (repeated, self.names)}
        self._tokens: dict[int, int] = {}
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
        found = self._layouts.get(count)
        if found is None:
            raise ValueError(
                f"{layer or 'a layer'} was called with an input of shape {tuple(x.shape)} in a mixed batch of "
                f"{len(self.names)} rows, and which adapter its {count} rows belong to cannot be told. Name an adapter "
                "for each row that the model sees (each= and tiled= of `rows` repeat them)"
            )
        return found

    def tokens(self, x: Tensor) -> int | None:
        """How many tokens of each row a layer's input `x` holds, if it is a batch flattened into tokens."""
        return self._tokens.get(len(x)) if x.ndim in (1, 2) and len(x) not in self._layouts else None

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
            if tensor.ndim in (2, 3):
                self._tokens[tensor.shape[0] * tensor.shape[1]] = tensor.shape[1]


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
