r"""EVA (Paischer et al. 2024, arXiv:2410.07170): A spans the directions of most variance among a layer's inputs.

The start needs data: an adapter with `init_lora_weights="eva"` begins as plain LoRA, until
`initialize_lora_eva_weights` (`core/eva.py`) has seen some. Here are its options and the principal components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter import kaiming_
from .registry import Lora, Start, initialisation


@dataclass
class EvaConfig:
    """Options of EVA; names and defaults are PEFT's."""

    rho: float = 2.0
    """How far ranks may be redistributed: a layer gets at most rho times its rank, 1 keeps all ranks as they are."""
    tau: float = 0.99
    """Cosine between a component before and after a batch, in [0, 1], from which on it counts as found."""
    use_label_mask: bool = True
    """Leave out tokens whose label is `label_mask_value`: what is not learned from needs no directions."""
    label_mask_value: int = -100
    """The label that the losses of transformers ignore."""
    whiten: bool = False
    """Divide each direction by the root of its singular value; helps in vision, says the paper."""
    adjust_scaling_factors: bool = True
    """Scale alpha with a layer's new rank, so that its gradients keep their size."""

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ValueError(f"rho={self.rho} would shrink every rank: give 1 or more")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau={self.tau} is no cosine from 0 to 1")


@initialisation("eva")
def eva(lora: Lora, weight: Tensor) -> Start:
    """As plain LoRA, until there is data."""
    a = kaiming_(weight.new_empty(lora.r, weight.shape[1]))
    return Start(weight.new_zeros(len(weight), lora.r), a)


class Components:
    """Leading principal components of rows that come in batches (Ross et al. 2008, "Incremental learning for robust
    visual tracking"): each batch is decomposed together with the components so far and the shift of the mean."""

    def __init__(self, number: int):
        self.number = number
        self.count = 0
        self.vectors = self.values = self.mean = torch.empty(0)
        self.variance = torch.zeros(())  # summed over features, times count

    def add(self, rows: Tensor) -> Tensor:
        """Take in rows (n, features), n at least `number`; returns for each component its cosine to the one before."""
        rows = rows.cpu() if rows.device.type == "mps" else rows  # which has no float64
        n, mean = len(rows), rows.mean(0, dtype=torch.float64)
        centred = (rows - mean).to(rows.dtype)
        total = self.count + n
        self.variance = self.variance + centred.square().sum(dtype=torch.float64)
        matrix, before = centred, None
        if self.count:
            shift = (self.count * n / total) ** 0.5 * (self.mean - mean)
            self.variance = self.variance + shift.square().sum(dtype=torch.float64)
            matrix = torch.vstack([self.values[:, None] * self.vectors, centred, shift])
            mean = mean + self.count / total * (self.mean - mean)
            before = self.vectors
        with torch.random.fork_rng():
            torch.manual_seed(42)  # the same data give the same components
            _, s, v = torch.svd_lowrank(matrix, q=min(2 * self.number, *matrix.shape), niter=4)
        vectors = v.T[: self.number]
        peaks = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        self.vectors, self.values = vectors * peaks.sign(), s[: self.number]
        self.mean, self.count = mean, total
        if before is None:
            return torch.zeros(len(vectors), device=rows.device)
        return torch.nn.functional.cosine_similarity(self.vectors, before.to(self.vectors))

    @property
    def shares(self) -> Tensor:
        """The share of all variance that each component explains."""
        return (self.values.double().square() / self.variance).to(self.values.dtype)
