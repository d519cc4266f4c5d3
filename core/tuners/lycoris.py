"""What LoHa and LoKr share: options, structured dropout, and Tucker kernels (Yeh et al. 2023, arXiv:2309.14859)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter import Dense
from ..config import RankedConfig
from ..sites import Site
from .dora import OptionalDora


@dataclass
class LycorisConfig(OptionalDora, RankedConfig):
    """Options of the LyCORIS methods; names and defaults are PEFT's."""

    alpha: float = 8
    """Numerator of the scale alpha / r."""
    rank_dropout: float = 0.0
    """Probability of dropping an output feature of the delta in training."""
    module_dropout: float = 0.0
    """Probability of skipping the whole adapter of a layer in a training step."""
    use_effective_conv2d: bool = False
    """Decompose kernels larger than 1x1 as Tucker products rather than as flat matrices: far fewer parameters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank_dropout", "module_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a probability below 1")


class Lycoris(Dense):
    """A delta with a structured factorisation. Write `delta` and `product`, its equal that avoids building it."""

    views = ("scaling", "r", "alpha", "rank_dropout", "module_dropout")
    rescale_rank_dropout = True
    paddable = True

    def __init__(self, config: LycorisConfig, site: Site, path: str, device: torch.device, dtype: torch.dtype):
        super().__init__(config, site, path, device, dtype)
        self.r, self.alpha = config.rank_and_alpha(path)
        self.scaling = self.alpha / self.r
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        self.tucker = config.use_effective_conv2d and any(k > 1 for k in site.kernel)

    @property
    def tucker_kernel(self) -> tuple[int, ...]:
        """Kernel axes of a Tucker core; LyCORIS stores those of a 1d convolution as (k, 1)."""
        return self.site.kernel if len(self.site.kernel) > 1 else (*self.site.kernel, 1)

    def product(self, x: Tensor) -> Tensor:
        """`site.apply(x, delta())`, by the cheapest equal way."""
        return super().branch(x)

    def branch(self, x: Tensor) -> Tensor:
        y = self.product(x)
        if not self.training:
            return y
        if self.rank_dropout:
            keep = (torch.rand(self.site.out, device=y.device) > self.rank_dropout).to(y.dtype)
            if self.rescale_rank_dropout:
                keep = keep / keep.mean().clamp(min=1e-6)
            y = y * self.site.along_output(keep)
        if self.module_dropout:  # a product, not a branch in Python, so that compiled graphs stay whole
            y = y * (torch.rand((), device=y.device) > self.module_dropout).to(y.dtype)
        return y


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Kernel (out, in, *k) of a Tucker product: core (r, r, *k), a (r, out), b (r, in)."""
    return torch.einsum("ij...,ip,jq->pq...", core, a, b)
