"""Many low-rank adapters of one layer as one product.

In a mixed batch every row i has factors of its own: ``y_i + B_i A_i x_i``. Run one after the other, small products and
the copies around them cost more than the base layer; here A and B of all adapters are stacked once, and two batched
products run them all. Rows are cut into segments of one adapter each, no more padded than is worth it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import Adapter, Factored, cast
from .rows import BASE, Groups
from .sites import Site


def stack_factors(factors: Sequence[tuple[Tensor, Tensor]], gains: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Factors B, A of any ranks as A (G, r, cols) and B (G, out, r) of the largest rank; the gains go into B."""
    rank = max(len(a) for _, a in factors)
    tall = torch.stack([a if len(a) == rank else F.pad(a, (0, 0, 0, rank - len(a))) for _, a in factors])
    wide = torch.stack([b if b.shape[1] == rank else F.pad(b, (0, rank - b.shape[1])) for b, _ in factors])
    if len(set(gains)) == 1:
        return tall, wide * gains[0]
    return tall, wide * torch.tensor(gains, dtype=wide.dtype, device=wide.device)[:, None, None]


def groupable(site: Site, adapters: Sequence[Adapter]) -> bool:
    """Whether adapters may run as `GroupedFactors`, which then equal what they do alone."""
    fit = (isinstance(a, Factored) and a.only_factors and isinstance(a.gain, (int, float)) for a in adapters)
    return site.pointwise and all(fit)


class GroupedFactors:
    """Adapters of one layer, by name, that run together. Their stacks are kept while nobody trains or changes them."""

    def __init__(self, site: Site, adapters: dict[str, Any]):
        self.site, self.adapters = site, adapters
        self._kept: _Stacks | None = None

    def dropout(self) -> float | None:
        """That of all adapters now, or None if they differ and cannot run together."""
        found = {a.dropout if a.training else 0.0 for a in self.adapters.values()}
        return found.pop() if len(found) == 1 else None

    def run(self, y: Tensor, x: Tensor, groups: Groups, dropout: float) -> Tensor:
        """y + B A x, row by row, with the factors of the adapter that each belongs to.

        y: the base layer's output (rows, ..., out) for x (rows, ..., cols).
        """
        a, b = self._stacks(tuple(groups.places), y.dtype)  # (G, r, cols), (G, out, r)
        x = cast(x, y.dtype)
        if dropout:
            x = F.dropout(x, dropout)
        segments = groups.segments(tokens=x[0, ..., 0].numel(), rank=a.shape[1])
        if segments.owners is not None:
            a, b = a[segments.owners], b[segments.owners]
        h = x if segments.rows is None else x.index_select(0, segments.rows)
        h = torch.bmm(h.reshape(segments.number, -1, a.shape[2]), a.mT)  # (segments, size * tokens, r)
        if segments.back is None:
            return torch.baddbmm(y.reshape(segments.number, -1, b.shape[1]), h, b.mT).view(y.shape)
        h = torch.bmm(h, b.mT).view(-1, *y.shape[1:])  # (segments * size, ..., out)
        return y + h.index_select(0, segments.back)

    def _stacks(self, names: tuple[str, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B by group, with zeros for the base."""
        if self._kept is not None and self._kept.hold(names, dtype):
            return self._kept.stacks
        adapters = [self.adapters[name] for name in names if name != BASE]
        factors = [a.factors() for a in adapters]
        gains = [a.gain for a in adapters]
        given = list(factors)
        if BASE in names:
            b, a = factors[0]
            factors.insert(names.index(BASE), (b.new_zeros(self.site.out, 1), a.new_zeros(1, self.site.cols)))
            gains.insert(names.index(BASE), gains[0])
        stacks = stack_factors([(b.to(dtype), a.to(dtype)) for b, a in factors], gains)
        self._kept = None if torch.compiler.is_compiling() else _Stacks.of(names, adapters, given, stacks)
        return stacks


class _Stacks:
    """Stacked factors, and what they were made of."""

    def __init__(
        self,
        names: tuple[str, ...],
        adapters: list[Any],
        places: list[tuple[dict[str, Any], str]],
        stacks: tuple[Tensor, Tensor],
    ):
        self.names, self.adapters, self.places, self.stacks = names, adapters, places, stacks
        self.tensors = [held[key] for held, key in places]
        self.versions = [t._version for t in self.tensors]
        self.gains = [a.gain for a in adapters]

    @classmethod
    def of(
        cls,
        names: tuple[str, ...],
        adapters: list[Any],
        factors: list[tuple[Tensor, Tensor]],
        stacks: tuple[Tensor, Tensor],
    ) -> _Stacks | None:
        """None if a change could go unnoticed: the factors are no tensors of the adapters, or without a version."""
        if any(s.requires_grad or s.is_inference() for s in stacks):
            return None
        places = []
        for adapter, pair in zip(adapters, factors, strict=True):
            own = {id(held[key]): (held, key) for _, held, key in adapter.slots()}
            if any(id(factor) not in own or factor.is_inference() for factor in pair):
                return None
            places += [own[id(factor)] for factor in pair]
        return cls(names, adapters, places, stacks)

    def hold(self, names: tuple[str, ...], dtype: torch.dtype) -> bool:
        """Whether they are still those of these adapters."""
        if names != self.names or dtype != self.stacks[0].dtype:
            return False
        now = [held[key] for held, key in self.places]
        return (
            all(map(operator.is_, now, self.tensors))
            and [t._version for t in now] == self.versions
            and [a.gain for a in self.adapters] == self.gains
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in now))
        )
