"""A layer in a mixed batch: every row through its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .adapter import Inner
from .kernels import GroupedFactors, groupable
from .rows import BASE, Groups, take
from .stack import Base, Stacked

if TYPE_CHECKING:
    from .layer import AdaptedLayer
    from .rows import Rows

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class Mixed:
    """What runs while the model's `State` has rows. The base layer runs once, on all of them, where it can."""

    def __init__(self, layer: AdaptedLayer):
        self.layer = layer
        self._adapters: tuple[str, ...] = ()
        """Those of the rows that `_prepare` was last called for."""

    def _prepare(self, adapters: tuple[str, ...]) -> None:
        layer = self.layer
        self._adapters = adapters
        self.here = tuple(name for name in adapters if name in layer.adapters)
        found = {name: layer.adapters[name] for name in self.here}
        self.whole = any(a.whole is not None or a.by_name for a in found.values())
        grouped = bool(found) and groupable(layer.site, list(found.values()))
        self.grouped = GroupedFactors(layer.site, found) if grouped else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.layer.state.rows
        assert rows is not None
        if rows.adapters != self._adapters:
            self._prepare(rows.adapters)
        if not self.here:
            return self.layer.base_layer(*args, **kwargs)
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return self._any_inputs(args, kwargs, rows)
        x = args[0]
        if x.ndim and len(x) == 1 < rows.batch:  # one row for all, as position ids often are
            x = x.expand(rows.batch, *x.shape[1:])
        tokens = rows.tokens(x)
        if tokens is None:
            return self._one_input(x, rows)
        y = self._one_input(x.unflatten(0, (-1, tokens)), rows)
        return pytree.tree_map(lambda t: t.flatten(0, 1), y)

    def _one_input(self, x: Tensor, rows: Rows) -> Any:
        layer = self.layer
        if self.whole:
            return self._any_inputs((x,), {}, rows)
        groups = rows.layout(x, layer.path).groups(self.here, x.device)
        dropout = None if self.grouped is None or x.ndim < 2 else self.grouped.dropout()
        if self.grouped is not None and dropout is not None:
            return self.grouped.run(layer.base_layer(x), x, groups, dropout)
        base = _Shared(Base(layer.base_layer, layer.site), x)
        outputs = []
        for name, index in groups.parts:
            part = take(x, index)
            inner = _Part(base, part, index)
            outputs.append((inner if name == BASE else Stacked(layer.adapters[name], inner))(part))
        return groups.join(outputs)

    def _any_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Rows) -> Any:
        """Every group apart, with its rows of all inputs and outputs, however nested."""
        layer = self.layer
        leaves, form = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
        strange = sorted({type(f).__name__ for f in leaves if not isinstance(f, (*_PLAIN, Tensor))})
        if strange or not tensors:
            reason = f"is given {', '.join(strange)}" if strange else "is given no tensor"
            raise TypeError(f"{layer.path} {reason}, which a mixed batch cannot divide into rows")
        groups = rows.layout(tensors[0], layer.path).groups(self.here, tensors[0].device)
        outputs = []
        for name, index in groups.parts:
            own = [take(f, index) if isinstance(f, Tensor) and f.ndim and len(f) == groups.count else f for f in leaves]
            own_args, own_kwargs = pytree.tree_unflatten(own, form)
            outputs.append(layer.run(() if name == BASE else (name,), own_args, own_kwargs))
        return _join(outputs, groups, layer.path)


class _Shared:
    """The base layer's output for all rows, computed when it is first asked for."""

    def __init__(self, base: Base, x: Tensor):
        self.base, self.x = base, x
        self._y: Tensor | None = None

    @property
    def y(self) -> Tensor:
        if self._y is None:
            self._y = self.base(self.x)
        return self._y


class _Part(Inner):
    """The base layer for some rows: of their own input its output is known."""

    def __init__(self, shared: _Shared, x: Tensor, index: slice | Tensor):
        self.shared, self.x, self.index = shared, x, index

    def __call__(self, x: Tensor) -> Tensor:
        return take(self.shared.y, self.index) if x is self.x else self.shared.base(x)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        return self.shared.base.weights()


def _join(outputs: Sequence[Any], groups: Groups, path: str) -> Any:
    """Outputs of the groups, of one structure, as the output for all rows."""
    flat, forms = zip(*map(pytree.tree_flatten, outputs), strict=True)
    if any(form != forms[0] for form in forms):
        raise TypeError(f"{path} returns a different structure for different rows, so a mixed batch cannot join them")
    sizes = [len(range(*i.indices(groups.count))) if isinstance(i, slice) else len(i) for _, i in groups.parts]
    joined = [_join_leaf(leaves, sizes, groups, path) for leaves in zip(*flat, strict=True)]
    return pytree.tree_unflatten(joined, forms[0])


def _join_leaf(leaves: tuple[Any, ...], sizes: list[int], groups: Groups, path: str) -> Any:
    if all(isinstance(leaf, Tensor) for leaf in leaves):
        if [len(leaf) if leaf.ndim else 0 for leaf in leaves] == sizes:
            return groups.join(leaves)
        same = all(torch.equal(leaf, leaves[0]) for leaf in leaves)
    else:
        same = all(leaf is leaves[0] or (isinstance(leaf, _PLAIN) and leaf == leaves[0]) for leaf in leaves)
    if not same:
        raise TypeError(
            f"{path} returns something that has no rows and differs between adapters, so a mixed batch cannot join it"
        )
    return leaves[0]
