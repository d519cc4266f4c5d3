r"""GLoRA (Chavan et al. 2023, arXiv:2306.07967), as in LyCORIS: $W' = W + s (W A_1 A_2 + B_1 B_2)$.

The one product moves the input before the layer, the other adds to its output:
``y' = W (x + s A_1 A_2 x) + s B_1 B_2 x``. A acts on the channels of a convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Factor, Folded, Inner, kaiming_, method, plus
from ..config import PeftType, RankedConfig
from ..sites import Site


@dataclass
class GLoraConfig(RankedConfig):
    """Options of GLoRA; PEFT has no such method."""

    peft_type: PeftType | str | None = PeftType.GLORA
    alpha: float = 8
    """Numerator of the scale alpha / r."""
    init_weights: bool = True
    """True starts as the identity (zero A2 and B2); False random, for tests."""


@method(GLoraConfig)
class GLoRA(Folded):
    paddable = True
    views = ("a1", "a2", "b1", "b2", "r", "alpha")

    def __init__(self, config: GLoraConfig, site: Site, path: str, device: torch.device, dtype: torch.dtype):
        super().__init__(config, site, path, device, dtype)
        self.r, self.alpha = config.rank_and_alpha(path)
        self.scaling = self.alpha / self.r
        ones = site.kernel_ones
        self.a1 = Factor(self.new(site.channels, self.r, *ones))
        self.a2 = Factor(self.new(self.r, site.channels, *ones))
        self.b1 = Factor(self.new(site.out, self.r, *ones))
        self.b2 = Factor(self.new(self.r, site.channels, *site.kernel))

    def reset(self) -> None:
        for factor in (self.a1, self.a2, self.b1, self.b2):
            kaiming_(factor.weight)
        if self.config.init_weights:
            nn.init.zeros_(self.a2.weight)
            nn.init.zeros_(self.b2.weight)

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A1 (channels, r), A2 (r, channels), B1 (out, r), B2 (r, cols)."""
        a1, a2, b1, b2 = (f.weight.flatten(1).to(dtype) for f in (self.a1, self.a2, self.b1, self.b2))
        return a1, a2, b1, b2

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a1, a2, b1, b2 = self.matrices(weight.dtype)
        by_channel = weight.view(-1, self.site.channels, prod(self.site.kernel))
        moved = torch.einsum("oik,ir,rj->ojk", by_channel, a1, a2).flatten(1)
        return weight + self.scaling * (moved + b1 @ b2), bias

    def forward(self, x: Tensor, inner: Inner) -> Tensor:
        if not self.site.pointwise:
            return super().forward(x, inner)
        a1, a2, b1, b2 = self.matrices(x.dtype)
        y = inner(plus(x, F.linear(F.linear(x, a2), a1), self.scaling))
        return plus(y, F.linear(F.linear(x, b2), b1).to(y.dtype), self.scaling)
