"""Full differences: ``W' = W + diff``, ``b' = b + diff_b``, also of norms. What LyCORIS calls `full` and `norm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adapter import Dense, method
from ..config import LayeredConfig, PeftType
from ..sites import Site


@dataclass
class FullConfig(LayeredConfig):
    """Options of full differences; PEFT has no such method."""

    peft_type: PeftType | str | None = PeftType.FULL
    scale: float = 1.0
    """What the difference is multiplied by."""
    train_bias: bool = False
    """Change the bias too, or add one."""
    init_weights: bool = True
    """True starts as the identity; False random, for tests."""

    norms: ClassVar[bool] = True


@method(FullConfig)
class Full(Dense):
    views = ("diff", "diff_b", "scaling")

    def __init__(self, config: FullConfig, site: Site, path: str, device: torch.device, dtype: torch.dtype):
        super().__init__(config, site, path, device, dtype)
        if config.train_bias and "bias" not in site.module._parameters:
            raise ValueError(f"train_bias=True is not supported for {path}: {type(site.module).__name__} has no bias")
        self.scaling = config.scale
        self.diff = self.new(site.out) if site.elementwise else self.new(site.out, site.channels, *site.kernel)
        if config.train_bias:
            self.diff_b = self.new(site.out)

    def reset(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter) if self.config.init_weights else nn.init.normal_(parameter, std=0.1)

    def delta(self) -> Tensor:
        return self.diff.reshape(self.site.out, -1)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().fold(weight, bias)
        if self.config.train_bias:
            extra = self.gain * self.diff_b.to(weight.dtype)
            bias = extra if bias is None else bias + extra
        return weight, bias

    def branch(self, x: Tensor) -> Tensor:
        if not self.config.train_bias:
            return super().branch(x)
        return self.site.apply(x, self.delta().to(x.dtype), self.diff_b.to(x.dtype))
