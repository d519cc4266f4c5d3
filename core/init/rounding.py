"""Rounding weights as quantised layers store them, in plain torch: what they dequantise to, bit layout aside."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, appendix E): quantiles of a normal."""
BLOCK = 64
"""Entries that share one scale, in the order in which the weight is stored."""


def nf4(weight: Tensor) -> Tensor:
    """The nearest of 16 levels, scaled by the largest entry of each block."""
    levels = torch.tensor(NF4, dtype=weight.dtype, device=weight.device)
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = torch.bucketize((blocks / scale.clamp(min=torch.finfo(weight.dtype).tiny)).contiguous(), middles)
    return (levels[nearest] * scale).flatten()[: len(flat)].view(weight.shape)


def int8(weight: Tensor) -> Tensor:
    """The nearest of 255 levels, scaled by the largest entry of each row."""
    rows = weight.reshape(len(weight), -1)
    scale = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    return ((rows / scale).round() * scale).view(weight.shape)


ROUNDINGS: dict[int, Callable[[Tensor], Tensor]] = {4: nf4, 8: int8}
"""By bits."""
