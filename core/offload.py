"""Where to compute what is too much for the CPU, when the weights wait there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def accelerator() -> torch.device | None:
    """The device that heavy work goes to, if there is one."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def compute_device(config: Any, weight: Tensor) -> torch.device:
    """Where to work on `weight`: where it is, or with `ephemeral_gpu_offload` on the accelerator."""
    runtime = getattr(config, "runtime_config", None)
    if runtime is None or not runtime.ephemeral_gpu_offload or weight.device.type != "cpu":
        return weight.device
    return accelerator() or weight.device
