r"""OLoRA (Büyükakyüz 2024, arXiv:2406.01775): orthonormal directions from $W = Q R$, $B = Q_r$ and $A = R_r$."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Lora, Start, check_rank, initialisation


@initialisation("olora", subtracts=True)
def olora(lora: Lora, weight: Tensor) -> Start:
    check_rank(lora, weight, "OLoRA")
    q, r = torch.linalg.qr(weight)
    return Start(q[:, : lora.r], r[: lora.r])
