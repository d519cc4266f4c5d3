r"""LoKr (Yeh et al. 2023, arXiv:2309.14859): $\Delta W = \frac{\alpha}{r} C \otimes D$, with D and possibly C low-rank.

For a weight (out, in) with out = a * b and in = c * d, C is (a, c) and D is (b, d). The product with x needs no
Kronecker matrix: seen as (c, d), x is multiplied by D on one side and by C on the other.

In the files C is `lokr_w1` or `lokr_w1_a @ lokr_w1_b`; D is `lokr_w2` or `lokr_w2_a @ lokr_w2_b`, or a Tucker product
with core `lokr_t2`. As in PEFT, and unlike LyCORIS, the scale alpha / r also holds when both are full.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from ..adapter import kaiming_, method
from ..config import PeftType
from ..sites import Conv, Site
from .lycoris import Lycoris, LycorisConfig, tucker


@dataclass
class LoKrConfig(LycorisConfig):
    """Options of LoKr; names and defaults are PEFT's."""

    peft_type: PeftType | str | None = PeftType.LOKR
    decompose_both: bool = False
    """Make the left factor low-rank too, where its size allows."""
    decompose_factor: int = -1
    """Size of the left factor; -1 splits each dimension as evenly as its divisors allow."""
    left_shape: tuple[int, int] | None = None
    """Shape (a, c) of the left factor, for one layer whose split `decompose_factor` cannot name; PEFT has no such
    option."""
    rank_dropout_scale: bool = False
    """Keep the expected size of the delta under `rank_dropout`."""
    init_weights: bool | Literal["lycoris"] = True
    """True: zero left factor (identity); "lycoris": zero right factor (identity); False: all random, for tests."""


@cache
def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Split a dimension: (factor, rest) if factor divides it, else the most even (m, n) with m <= n and m <= factor.

    >>> factorization(320), factorization(320, 32), factorization(127)
    ((16, 20), (32, 10), (1, 127))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    m = max(d for d in range(1, int(dimension**0.5) + 1) if dimension % d == 0 and d <= max(limit, 1))
    return m, dimension // m


@method(LoKrConfig)
class LoKr(Lycoris):
    views = (
        *Lycoris.views, "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )  # fmt: skip

    def __init__(self, config: LoKrConfig, site: Site, path: str, device: torch.device, dtype: torch.dtype):
        super().__init__(config, site, path, device, dtype)
        r, kernel = self.r, site.kernel
        self.rescale_rank_dropout = config.rank_dropout_scale
        (self.a, self.b), (self.c, self.d) = self._split(config, path)
        self.low_c = config.decompose_both and r < max(self.a, self.c) / 2
        self.low_d = r < max(self.b, self.d) / 2
        self.tucker = self.tucker and self.low_d
        if self.low_c:
            self.lokr_w1_a, self.lokr_w1_b = self.new(self.a, r), self.new(r, self.c)
        else:
            self.lokr_w1 = self.new(self.a, self.c)
        if self.tucker:
            self.lokr_t2 = self.new(r, r, *self.tucker_kernel)
            self.lokr_w2_a, self.lokr_w2_b = self.new(r, self.b), self.new(r, self.d)
        elif self.low_d:
            self.lokr_w2_a, self.lokr_w2_b = self.new(self.b, r), self.new(r, self.d * prod(kernel))
        else:
            self.lokr_w2 = self.new(self.b, self.d, *kernel)

    def _split(self, config: LoKrConfig, path: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """((a, b), (c, d)) with a * b the output and c * d the input features."""
        sizes = self.site.out, self.site.channels
        if config.left_shape is None:
            return factorization(sizes[0], config.decompose_factor), factorization(sizes[1], config.decompose_factor)
        (a, c), (out, channels) = config.left_shape, sizes
        if out % a or channels % c:
            raise ValueError(f"{path}: a left factor of shape {a} x {c} does not divide a layer of {out} x {channels}")
        return (a, out // a), (c, channels // c)

    def reset(self) -> None:
        for parameter in self.parameters():
            kaiming_(parameter)
        init = self.config.init_weights
        if init == "lycoris":
            nn.init.zeros_(self.lokr_w2_b if self.low_d else self.lokr_w2)
        elif init:
            nn.init.zeros_(self.lokr_w1_a if self.low_c else self.lokr_w1)

    def left(self) -> Tensor:
        """C (a, c)."""
        return self.lokr_w1_a @ self.lokr_w1_b if self.low_c else self.lokr_w1

    def right(self) -> Tensor:
        """D as a matrix (b, d * prod(kernel))."""
        if self.tucker:
            return tucker(self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b).flatten(1)
        return self.lokr_w2_a @ self.lokr_w2_b if self.low_d else self.lokr_w2.flatten(1)

    def delta(self) -> Tensor:
        return torch.kron(self.left(), self.right())

    @property
    def by_rows(self) -> bool:
        return True

    def fold_rows(self, tile: Tensor, rows: slice) -> None:
        row = torch.arange(rows.start, rows.start + len(tile), device=tile.device)
        c, d = self.left()[row // self.b].to(tile.dtype), self.right()[row % self.b].to(tile.dtype)
        tile.add_((c[:, :, None] * d[:, None, :]).flatten(1), alpha=self.gain)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if self.tucker or not self.low_d:
            return None
        if self.low_c:  # (C_a C_b) x (D_a D_b) = (C_a x D_a) (C_b x D_b)
            pair = (self.lokr_w1_a, self.lokr_w2_a), (self.lokr_w1_b, self.lokr_w2_b)
        else:
            eye = torch.eye(self.c, dtype=self.lokr_w2_b.dtype, device=self.lokr_w2_b.device)
            pair = (self.lokr_w1, self.lokr_w2_a), (eye, self.lokr_w2_b)
        b, a = (torch.kron(left.contiguous(), right.contiguous()) for left, right in pair)
        return (b, a) if b.shape[1] < min(self.site.out, self.site.cols) else None

    def product(self, x: Tensor) -> Tensor:
        site = self.site
        batched = x.ndim == len(site.kernel) + 2
        if not (site.pointwise or (isinstance(site, Conv) and site.groups == 1 and batched)):
            return super().product(x)
        left, halves = self.left().to(x.dtype), [h.to(x.dtype) for h in self._right_halves()]
        if site.pointwise:
            h = x.unflatten(-1, (self.c, self.d))  # (..., c, d)
            for matrix in halves:
                h = h @ matrix.T  # (..., c, b)
            return (left @ h).flatten(-2)  # (..., a * b)
        h = x.reshape(-1, self.d, *x.shape[2:])  # (batch * c, d, *space)
        h = site.reduce(h, halves[0])
        for matrix in halves[1:]:
            h = site.expand(h, matrix)  # (batch * c, b, *space')
        y = left @ h.reshape(len(x), self.c, -1)  # (batch, a, b * space')
        return y.reshape(len(x), site.out, *h.shape[2:])

    def _right_halves(self) -> tuple[Tensor, ...]:
        """D as the matrices to multiply with one after the other."""
        return (self.lokr_w2_b, self.lokr_w2_a) if self.low_d and not self.tucker else (self.right(),)
