r"""IA3 (Liu et al. 2022, arXiv:2205.05638): $y' = l \odot (W x + b)$, or in feed-forward layers $W (l \odot x) + b$."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import defaults
from ..adapter import Inner, Transform, method
from ..config import PeftConfig, PeftType
from ..sites import Embedding, Site
from ..targets import matcher


@dataclass
class IA3Config(PeftConfig):
    """Options of IA3; names and defaults are PEFT's."""

    peft_type: PeftType | str | None = PeftType.IA3
    feedforward_modules: list[str] | set[str] | str | None = None
    """Targets whose input is scaled rather than their output: dotted suffixes or a regex."""
    fan_in_fan_out: bool = False
    """Kept for PEFT's files; the layer's class already tells how its weight is stored."""
    init_ia3_weights: bool = True
    """True starts as the identity (ones); False random, for tests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, list):
            self.feedforward_modules = set(self.feedforward_modules)
        if isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set):
            extra = sorted(self.feedforward_modules - self.target_modules)
            if extra:
                raise ValueError(f"`feedforward_modules` should be a subset of `target_modules`; not in it: {extra}")

    def complete(self, model_type: str | None) -> None:
        super().complete(model_type)
        if self.feedforward_modules is None:
            found = defaults.feedforward_for(model_type)
            if found is None:
                raise ValueError(self._no_default("feedforward_modules", model_type))
            self.feedforward_modules = found


@method(IA3Config)
class IA3(Transform):
    elementwise = True
    views = ("ia3_l",)

    def __init__(self, config: IA3Config, site: Site, path: str, device: torch.device, dtype: torch.dtype):
        super().__init__(config, site, path, device, dtype)
        if matcher(config.feedforward_modules)(path):
            if isinstance(site, Embedding):
                raise ValueError(f"feedforward_modules names {path}, but an embedding has no input features to scale")
            self.side = "input"
        features = site.out if self.side == "output" else site.channels * site.groups
        if site.kernel:
            shape = (1, features, *site.kernel_ones)
        else:
            shape = (features, 1) if self.side == "output" else (1, features)
        self.ia3_l = self.new(*shape)

    def reset(self) -> None:
        (nn.init.ones_ if self.config.init_ia3_weights else nn.init.normal_)(self.ia3_l)

    def map(self, x: Tensor) -> Tensor:
        return x * self.ia3_l.flatten().to(x.dtype)

    def pull(self, weight: Tensor) -> Tensor:
        groups = self.site.groups  # output features of group g see the g-th share of the channels
        by_channel = weight.view(groups, -1, self.site.channels, self.site.cols // self.site.channels)
        return (by_channel * self.ia3_l.to(weight.dtype).view(groups, 1, -1, 1)).view_as(weight)

    def forward(self, x: Tensor, inner: Inner) -> Tensor:
        if self.side == "output":
            y = inner(x)
            return y * self.site.along_output(self.ia3_l.flatten().to(y.dtype))
        return inner(x * self.site.along_output(self.ia3_l.flatten().to(x.dtype)))
