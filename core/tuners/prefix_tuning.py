"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190): n trained keys and values before the text's, in every layer.

softmax(q [P_k; K]^T) [P_v; V],  P = P_theta, or MLP(P'_theta) with `prefix_projection`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..adapter import method
from ..config import PeftType
from ..prompts.config import PromptLearningConfig
from ..prompts.prompt import Prefix, Reparameterised
from ..prompts.site import PromptSite


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Options of prefix tuning, under PEFT's names."""

    peft_type: PeftType | str | None = PeftType.PREFIX_TUNING
    init_weights: Literal["zero"] | None = None
    """"zero" starts with keys and values of zero, None with random ones."""
    encoder_hidden_size: int | None = None
    """Hidden size of the projection; None takes `token_dim`."""
    prefix_projection: bool = False
    """Train a small input and an MLP that makes the prefix of it, which the paper finds more stable."""

    of_cache: ClassVar[bool] = True


@method(PrefixTuningConfig)
class PrefixTuning(Reparameterised, Prefix):
    transform: nn.Sequential

    def __init__(
        self, config: PrefixTuningConfig, site: PromptSite, path: str, device: torch.device, dtype: torch.dtype
    ):
        super().__init__(config, site, path, device, dtype)
        config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim
        self.network = config.prefix_projection
        if self.network:
            hidden, inputs = config.encoder_hidden_size or 0, config.token_dim or 0
            transform = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, self.width))
            self.keep_network(self.count, inputs, transform=transform)

    def reset(self) -> None:
        super().reset()
        if self.config.init_weights == "zero":
            last = self.transform[-1].parameters() if self.network else [self.embedding.weight]
            for parameter in last:
                nn.init.zeros_(parameter)

    def run_network(self) -> Tensor:
        return self.transform(self.embedding.weight)
