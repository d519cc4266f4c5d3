"""LN tuning (Zhao et al. 2023, arXiv:2312.11420): the weights and biases of norms are trained, and nothing else.

The adapter holds the new values themselves. Any other layer that has a weight can be tuned so too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..adapter import Factor, Folded, method
from ..config import PeftConfig, PeftType
from ..sites import Site


@dataclass
class LNTuningConfig(PeftConfig):
    """Options of LN tuning, which has none of its own."""

    peft_type: PeftType | str | None = PeftType.LN_TUNING

    norms: ClassVar[bool] = True


@method(LNTuningConfig)
class LNTuning(Folded):
    views = ("ln_tuning_layers",)

    def __init__(self, config: LNTuningConfig, site: Site, path: str, device: torch.device, dtype: torch.dtype):
        super().__init__(config, site, path, device, dtype)
        bias = site.module._parameters.get("bias")
        self.packed = not site.module.weight.is_floating_point()  # quantized: then it holds the matrix itself
        shape = (site.out, site.cols) if self.packed else site.module.weight.shape
        self.ln_tuning_layers = Factor(self.new(*shape), None if bias is None else self.new(*bias.shape))

    def reset(self) -> None:
        weight, bias = self.site.read()
        self.ln_tuning_layers.weight.data.copy_(weight if self.packed else self.site.module.weight)
        if bias is not None:
            self.ln_tuning_layers.bias.data.copy_(bias)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        new = self.ln_tuning_layers.weight if self.packed else self.site.to_matrix(self.ln_tuning_layers.weight)
        return new.to(weight.dtype), None if bias is None else self.ln_tuning_layers.bias.to(weight.dtype)
