r"""Orthogonal initialisation: $B A = 0$ though neither factor is zero, so both learn from the first step.

The odd rows of a random rotation (r, r) span A and its even rows B (Dattatreya 2024, "Rethinking LoRA
initialisations"); their entries have the deviation 1/10 before the rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Lora, Start, initialisation

DEVIATION = 0.1


@initialisation("orthogonal")
def orthogonal(lora: Lora, weight: Tensor) -> Start:
    if lora.r % 2:
        raise ValueError(f"{lora.path}: init_lora_weights='orthogonal' needs an even rank, and r is {lora.r}")
    out, cols = weight.shape
    rotation = torch.linalg.qr(torch.randn(lora.r, lora.r))[0]
    a = rotation[0::2].T @ torch.randn(lora.r // 2, cols)  # (r, cols)
    b = torch.randn(out, lora.r // 2) @ rotation[1::2]  # (out, r)
    return Start(DEVIATION * b, DEVIATION * a)
