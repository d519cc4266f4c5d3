r"""PiSSA (Meng et al. 2024, arXiv:2404.02948): train the principal part of the weight.

With $W = U S V^T$ the factors start as $B = U_r \sqrt{S_r / s}$ and $A = \sqrt{S_r / s} V_r^T$, where s is the scale of
the adapter, so that $s B A$ is the best approximation of W of rank r. "pissa_niter_[n]" finds it by n subspace
iterations (Halko et al. 2011, arXiv:0909.4061), which for large layers takes seconds rather than minutes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Lora, Start, check_rank, initialisation

OVERSAMPLING = 8
"""Directions iterated beyond the rank: neighbours in the spectrum part sooner."""


@initialisation("pissa", subtracts=True)
def pissa(lora: Lora, weight: Tensor) -> Start:
    check_rank(lora, weight, "PiSSA")
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return _shared_out(u, s, vh, lora)


@initialisation("pissa_niter_[n]", r"pissa_niter_(?P<iterations>\d+)", subtracts=True)
def pissa_by_iteration(lora: Lora, weight: Tensor, iterations: int) -> Start:
    check_rank(lora, weight, "PiSSA")
    width = min(lora.r + OVERSAMPLING, *weight.shape)
    generator = torch.Generator().manual_seed(0)  # a file does not hold the start: it is computed again on loading
    test = torch.randn(weight.shape[1], width, generator=generator).to(weight)
    basis = torch.linalg.qr(weight @ test)[0]  # (out, width)
    for _ in range(iterations):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis)[0])[0]
    u, s, vh = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return _shared_out(basis @ u, s, vh, lora)


def _shared_out(u: Tensor, s: Tensor, vh: Tensor, lora: Lora) -> Start:
    root = (s[: lora.r] / lora.scaling).sqrt()
    return Start(u[:, : lora.r] * root, root[:, None] * vh[: lora.r])
