r"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454): $W' = W + \Lambda_b B \Lambda_d A$, with A and B random and shared.

Trained are the diagonals b (out,) and d (r,) of each layer. A (r, widest cols) and B (longest out, r) are frozen, the
same for all layers of an adapter: each takes the leading part that fits its weight. They are drawn on the CPU from
`projection_prng_key`, so that a file need not hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Factored, Inner, cast, method
from ..config import LayeredConfig, PeftType
from ..sites import Site


@dataclass
class VeraConfig(LayeredConfig):
    """Options of VeRA; names and defaults are PEFT's."""

    peft_type: PeftType | str | None = PeftType.VERA
    r: int = 256
    """Rank; larger than LoRA's, since a rank costs one number a layer."""
    projection_prng_key: int = 0
    """Seed of A and B."""
    save_projection: bool = True
    """Keep A and B in the file, for readers whose random numbers may differ; else they are drawn again."""
    vera_dropout: float = 0.0
    """Probability of dropping an entry of the branch's input in training."""
    d_initial: float = 0.1
    """What d starts from; the paper finds 0.1 or less good."""
    fan_in_fan_out: bool = False
    """Kept for PEFT's files; the layer's class already tells how its weight is stored."""
    bias: Literal["none", "all", "vera_only"] = "none"
    """Which biases of the base model are trained along."""
    init_weights: bool = True
    """True: b is zero; False: b is one and d normal, for tests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}")
        if not 0 <= self.vera_dropout < 1:
            raise ValueError(f"vera_dropout={self.vera_dropout} is not a probability below 1")
        if self.bias not in ("none", "all", "vera_only"):
            raise ValueError(f"bias={self.bias!r} is unknown; expected 'none', 'all' or 'vera_only'")


class Projections(nn.Module):
    """A and B of one adapter, in float32."""

    vera_A: Tensor  # noqa: N815
    vera_B: Tensor  # noqa: N815

    def __init__(self, config: VeraConfig, out: int, cols: int, device: torch.device):
        super().__init__()
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        for name, shape in {"vera_A": (config.r, cols), "vera_B": (out, config.r)}.items():
            bound = sqrt(6 / shape[1])  # Kaiming's, for a ReLU
            drawn = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn.to(device), persistent=config.save_projection)


@method(VeraConfig)
class Vera(Factored):
    views = ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B", "r")
    common: Projections

    def __init__(self, config: VeraConfig, site: Site, path: str, device: torch.device, dtype: torch.dtype):
        super().__init__(config, site, path, device, dtype)
        self.r, self.dropout = config.r, config.vera_dropout
        self.vera_lambda_b = self.new(site.out)
        self.vera_lambda_d = self.new(config.r)

    @classmethod
    def shared(cls, adapters: Mapping[str, Self]) -> Projections:
        sites = [adapter.site for adapter in adapters.values()]
        config: VeraConfig = next(iter(adapters.values())).config
        return Projections(config, max(s.out for s in sites), max(s.cols for s in sites), sites[0].device)

    def reset(self) -> None:
        if self.config.init_weights:
            nn.init.zeros_(self.vera_lambda_b)
            nn.init.constant_(self.vera_lambda_d, self.config.d_initial)
        else:
            nn.init.ones_(self.vera_lambda_b)
            nn.init.normal_(self.vera_lambda_d)

    @property
    def vera_A(self) -> Tensor:  # noqa: N802
        """Its part of A, (r, cols)."""
        return self.common.vera_A[:, : self.site.cols].to(self.vera_lambda_d.device)

    @property
    def vera_B(self) -> Tensor:  # noqa: N802
        """Its part of B, (out, r)."""
        return self.common.vera_B[: self.site.out].to(self.vera_lambda_d.device)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.vera_lambda_b[:, None] * self.vera_B, self.vera_lambda_d[:, None] * self.vera_A

    def forward(self, x: Tensor, inner: Inner) -> Tensor:
        # A and B need no gradient, so unlike `factors` this keeps no product of their size for the backward pass.
        y, along = inner(x), self.site.along_output
        a, b, d = self.vera_A.to(y.dtype), self.vera_B.to(y.dtype), self.vera_lambda_d.to(y.dtype)
        x = cast(x, y.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        h = self.site.reduce(x, a) * along(d.repeat(self.site.groups))
        return torch.addcmul(y, self.site.expand(h, b), along(self.gain * self.vera_lambda_b.to(y.dtype)))
