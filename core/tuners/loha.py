r"""LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098): $\Delta W = \frac{\alpha}{r} (B_1 A_1) \odot (B_2 A_2)$.

A Hadamard product of two rank-r matrices is one of rank r^2: its factors are the row-wise (column-wise) Khatri-Rao
products of B1, B2 (of A1, A2). Where r^2 (out + cols) < out * cols the branch runs through them, and blends use them
as an exact LoRA; else through the dense delta.

In the files `hada_w1_a`, `hada_w2_a` are B1, B2 and `hada_w1_b`, `hada_w2_b` are A1, A2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapter import kaiming_, method
from ..config import PeftType
from ..sites import Site
from .lycoris import Lycoris, LycorisConfig, tucker


@dataclass
class LoHaConfig(LycorisConfig):
    """Options of LoHa; names and defaults are PEFT's."""

    peft_type: PeftType | str | None = PeftType.LOHA
    init_weights: bool = True
    """True starts as the identity (zero A2); False all random, for tests."""


@method(LoHaConfig)
class LoHa(Lycoris):
    views = (*Lycoris.views, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def __init__(self, config: LoHaConfig, site: Site, path: str, device: torch.device, dtype: torch.dtype):
        super().__init__(config, site, path, device, dtype)
        r = self.r
        b_shape, a_shape = ((r, site.out), (r, site.channels)) if self.tucker else ((site.out, r), (r, site.cols))
        self.hada_w1_a, self.hada_w1_b = self.new(*b_shape), self.new(*a_shape)
        self.hada_w2_a, self.hada_w2_b = self.new(*b_shape), self.new(*a_shape)
        if self.tucker:
            self.hada_t1, self.hada_t2 = (self.new(r, r, *self.tucker_kernel) for _ in range(2))

    def reset(self) -> None:
        for parameter in self.parameters():
            kaiming_(parameter)
        if self.config.init_weights:
            nn.init.zeros_(self.hada_w2_b)

    def delta(self) -> Tensor:
        if self.tucker:
            one = tucker(self.hada_t1, self.hada_w1_a, self.hada_w1_b)
            two = tucker(self.hada_t2, self.hada_w2_a, self.hada_w2_b)
            return (one * two).flatten(1)
        return (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)

    @property
    def by_rows(self) -> bool:
        return not self.tucker

    def fold_rows(self, tile: Tensor, rows: slice) -> None:
        b1, a1, b2, a2 = (f.to(tile.dtype) for f in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b))
        tile.add_((b1[rows] @ a1).mul_(b2[rows] @ a2), alpha=self.gain)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        out, cols, k = self.site.out, self.site.cols, self.hada_w1_a.shape[1] ** 2
        if self.tucker or k * (out + cols) >= out * cols:
            return None
        b = self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None, :]  # (out, r, r)
        a = self.hada_w1_b[:, None, :] * self.hada_w2_b[None, :, :]  # (r, r, cols)
        return b.flatten(1), a.flatten(0, 1)

    def product(self, x: Tensor) -> Tensor:
        factors = self.factors()
        if factors is None:
            return super().product(x)
        b, a = (f.to(x.dtype) if x.is_floating_point() else f for f in factors)
        return self.site.expand(self.site.reduce(x, a), b)
