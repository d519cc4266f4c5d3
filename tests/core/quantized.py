"""Small quantized layers, as bitsandbytes makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

bnb: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

IN, OUT = 64, 128
"""Whole blocks: bitsandbytes misreads others on a CPU."""


def _four_bits(linear: nn.Linear, **options: Any) -> nn.Module:
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, **options)
    layer.weight.data, layer.bias = linear.weight.data, linear.bias
    return layer.to("cpu")  # quantises


def _eight_bits(linear: nn.Linear, **options: Any) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, **options
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


QUANTIZED = {
    "nf4": lambda linear: _four_bits(linear, quant_type="nf4", compress_statistics=False),
    "nf4-double": lambda linear: _four_bits(linear, quant_type="nf4"),
    "fp4-bf16": lambda linear: _four_bits(linear.bfloat16(), quant_type="fp4", compress_statistics=False).float(),
    "int8": lambda linear: _eight_bits(linear),
    "int8-outliers": lambda linear: _eight_bits(linear, threshold=2.0),
}


class QuantNet(nn.Module):
    """Two quantized layers around a plain norm, and a plain head."""

    def __init__(self, kind: str, bias: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.first = QUANTIZED[kind](nn.Linear(IN, OUT, bias))
        self.norm = nn.LayerNorm(OUT)
        self.second = QUANTIZED[kind](nn.Linear(OUT, IN, bias))
        self.head = nn.Linear(IN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.norm(self.first(x))))


def net(kind: str, **options: Any) -> QuantNet:
    return QuantNet(kind, **options)
