r"""LoftQ (Li et al. 2023, arXiv:2310.08659): a quantised base, and factors that make up for what was lost.

Alternating $Q = q(W - L R)$ and $L R = \mathrm{svd}_r(W - Q)$. The base layer runs with the rounded weight Q while the
adapter is there; deleting the adapter, or unloading, puts W back bit for bit. As in PEFT the factors do not know the
scale, so `lora_alpha` should equal `r`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .registry import Lora, Start, check_rank, initialisation
from .rounding import ROUNDINGS


@dataclass
class LoftQConfig:
    """Options of LoftQ; names and defaults are PEFT's."""

    loftq_bits: int = 4
    """4 rounds to NF4 in blocks of 64 entries, 8 to whole numbers with a scale for each row."""
    loftq_iter: int = 1
    """How often rounding and fitting alternate, 1 or more; the paper finds little to gain beyond 5."""

    def __post_init__(self) -> None:
        if self.loftq_bits not in ROUNDINGS:
            raise ValueError(f"loftq_bits={self.loftq_bits} is not supported; expected one of {sorted(ROUNDINGS)}")
        if self.loftq_iter < 1:
            raise ValueError(f"loftq_iter={self.loftq_iter} is no number of rounds: give 1 or more")


@initialisation("loftq", replaces_base=True)
def loftq(lora: Lora, weight: Tensor) -> Start:
    check_rank(lora, weight, "LoftQ")
    options = LoftQConfig(**lora.config.loftq_config)
    # blocks are cut from the weight as it is stored
    stored = lora.site.from_matrix(weight)
    rounded = ROUNDINGS[options.loftq_bits](stored)
    b, a = fit(weight - lora.site.to_matrix(rounded), lora.r)
    for _ in range(options.loftq_iter - 1):
        rounded = ROUNDINGS[options.loftq_bits](stored - lora.site.from_matrix(b @ a))
        b, a = fit(weight - lora.site.to_matrix(rounded), lora.r)
    return Start(b, a, lora.site.to_matrix(rounded))


def fit(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of rank r, the singular values shared out evenly."""
    u, s, vh = torch.linalg.svd(residual, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]
