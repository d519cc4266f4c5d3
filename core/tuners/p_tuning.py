"""P-tuning (Liu et al. 2021, arXiv:2103.10385): virtual tokens that a small network makes of trained inputs.

P = MLP(H)  or  P = MLP(BiLSTM(H)),  H of shape (n, d)
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from ..adapter import method
from ..config import PeftType
from ..errors import PeftWarning
from ..prompts.config import PromptLearningConfig
from ..prompts.prompt import Reparameterised, SoftPrompt
from ..prompts.site import PromptSite


class PromptEncoderReparameterizationType(StrEnum):
    """The network."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Options of p-tuning, under PEFT's names."""

    peft_type: PeftType | str | None = PeftType.P_TUNING
    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    """"MLP", of three layers, which trains faster, or the paper's "LSTM", in both directions with an MLP after it."""
    encoder_hidden_size: int | None = None
    """Hidden size of the network; None takes `token_dim`."""
    encoder_num_layers: int = 2
    """Layers of the LSTM; the MLP always has three."""
    encoder_dropout: float = 0.0
    """Dropout between the layers of the LSTM, while training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = [t.value for t in PromptEncoderReparameterizationType]
        kind = self.encoder_reparameterization_type
        if kind not in allowed:
            raise ValueError(f"encoder_reparameterization_type={kind!r} is unknown; expected one of {allowed}")
        self.encoder_reparameterization_type = PromptEncoderReparameterizationType(kind)
        if kind == "MLP" and self.encoder_num_layers != 2:
            warnings.warn("for MLP, encoder_num_layers is ignored: it has three layers", PeftWarning, stacklevel=3)


@method(PromptEncoderConfig)
class PTuning(Reparameterised, SoftPrompt):
    lstm_head: nn.LSTM
    mlp_head: nn.Sequential

    def __init__(
        self, config: PromptEncoderConfig, site: PromptSite, path: str, device: torch.device, dtype: torch.dtype
    ):
        super().__init__(config, site, path, device, dtype)
        config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim
        hidden, size = config.encoder_hidden_size or 0, config.token_dim or 0
        rows = config.total_virtual_tokens
        if config.encoder_reparameterization_type == "LSTM":
            layers, dropout = config.encoder_num_layers, config.encoder_dropout
            lstm = nn.LSTM(size, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
            head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, size))
            self.keep_network(rows, size, lstm_head=lstm, mlp_head=head)
        else:
            linear = [nn.Linear(size, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, size)]
            head = nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])
            self.keep_network(rows, size, mlp_head=head)

    def run_network(self) -> Tensor:
        h = self.embedding.weight  # (n, d)
        if self.config.encoder_reparameterization_type == "LSTM":
            h = self.lstm_head(h[None])[0][0]  # (n, 2 hidden)
        return self.mlp_head(h)
