"""Layers around layers: what runs when adapters are stacked on a base layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .adapter import Adapter, Branch, Inner, wide
from .sites import Site


class Base(Inner):
    """The innermost layer of a stack."""

    def __init__(self, module: Callable[[Tensor], Tensor], site: Site):
        self.module, self.site = module, site

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        return self.site.read()


class Stacked(Inner):
    """An adapter around the layer below it."""

    def __init__(self, adapter: Adapter, inner: Inner):
        self.adapter, self.inner = adapter, inner

    def __call__(self, x: Tensor) -> Tensor:
        y = self.adapter.forward(x, self.inner)
        strength = self.adapter.strength
        if strength == 1.0 or isinstance(self.adapter, Branch):  # a branch applies its strength itself, for free
            return y
        return torch.lerp(self.inner(x), y, strength)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.inner.weights()
        return fold(self.adapter, wide(weight), None if bias is None else wide(bias))


def fold(adapter: Adapter, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`adapter.fold` at the adapter's strength."""
    new_weight, new_bias = adapter.fold(weight, bias)
    if knows_strength(adapter):
        return new_weight, new_bias
    if new_bias is not None:
        new_bias = torch.lerp(torch.zeros_like(new_bias) if bias is None else bias, new_bias, adapter.strength)
    return torch.lerp(weight, new_weight, adapter.strength), new_bias


def knows_strength(adapter: Adapter) -> bool:
    """Whether the adapter's own `fold` is right as it is: a branch multiplies its strength in."""
    return adapter.strength == 1.0 or isinstance(adapter, Branch)
