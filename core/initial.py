"""An adapter that started from the base weight, as plain LoRA over the original model.

$W' = W + s (B A - B_0 A_0) = W + s\\,[B \\mid -B_0]\\,[A \\,;\\, A_0]$: a LoRA of twice the rank whose scale is s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .config import PeftConfig
from .tuners.lora import LoraConfig

_PAIRS = {"lora_A.weight": 0, "lora_B.weight": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
"""Names of the factors, and the axis of each that is the rank."""


def as_plain_lora(
    config: PeftConfig, tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors of the plain LoRA, given the factors B_0 and A_0 that training started from.

    Raises:
        ValueError: it is no product of factors, or `initial` is not where it started from.
    """
    if not isinstance(config, LoraConfig) or config.use_dora or config.lora_bias or config.init_lora_weights == "loftq":
        raise ValueError(
            "only a LoRA that is a product of factors over the original base weights can be converted to a plain LoRA "
            "by its start: no other method, no DoRA, no biases, no quantised weights"
        )
    doubled: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        axis = next((axis for name, axis in _PAIRS.items() if key.endswith(f".{name}")), None)
        if axis is None:
            doubled[key] = tensor  # a module trained whole
            continue
        start = initial.get(key)
        if start is None or start.shape != tensor.shape:
            found = "no such tensor" if start is None else f"one of shape {tuple(start.shape)}"
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}, and the initial adapter has {found}")
        start = start.to(tensor)
        doubled[key] = torch.cat([tensor, -start if axis else start], axis)
    return _doubled_config(config), doubled


def _doubled_config(config: LoraConfig) -> LoraConfig:
    """Twice the rank at the same scale. Where rank and alpha differ by layer, both keep their patterns."""
    growth = 2**0.5 if config.use_rslora else 2
    return replace(
        config,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * growth,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: alpha * growth for key, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
        loftq_config={},
        eva_config=None,
    )
