"""Best approximations of a lower rank (Eckart and Young 1936): of a product of factors, and of a dense matrix."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

OVERSAMPLING = 8
"""Columns of a Krylov block beyond the wanted rank, which keep neighbours in the spectrum apart."""
ITERATE_BELOW = 1 / 12
"""Width of a Krylov block, as a share of the shorter side, up to which iterating beats a full decomposition."""
DRIVERS = ("gesvd", "gesvdj", "gesvda")


@dataclass(frozen=True)
class LowRank:
    """A matrix B A, and how far it is from what it stands for."""

    b: Tensor  # (out, r)
    a: Tensor  # (r, cols)
    error: float = 0.0
    """Frobenius norm of the difference; NaN where there is nothing to compare with."""
    norm: float = 0.0
    """Frobenius norm of what it stands for; 0 where B A is that exactly and nobody needs the norm."""


@dataclass(frozen=True)
class Truncation:
    """How far to cut. `svd_rank`, `svd_clamp` and `svd_driver` are PEFT's."""

    svd_rank: int | None = None
    """Rank of the result. With `max_error` an upper limit."""
    max_error: float | None = None
    """Largest relative error in the Frobenius norm: the smallest rank that keeps to it is chosen, at least 1."""
    svd_clamp: float | None = None
    """Quantile at which the entries of both factors are clamped, above 0.5 to 1; None does not clamp."""
    svd_driver: str | None = None
    """Name of the cuSOLVER routine, one of `DRIVERS`. Given, dense matrices are decomposed in full rather than
    iterated; off CUDA by LAPACK."""

    def __post_init__(self) -> None:
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ValueError(f"svd_rank={self.svd_rank} is no rank: give 1 or more")
        if self.max_error is not None and not 0 <= self.max_error < 1:
            raise ValueError(f"max_error={self.max_error} is no relative error: give 0 or more, below 1")
        if self.svd_clamp is not None and not 0.5 < self.svd_clamp <= 1:
            raise ValueError(f"svd_clamp={self.svd_clamp} is no upper quantile: give a number above 0.5, at most 1")
        if self.svd_driver not in (None, *DRIVERS):
            raise ValueError(f"svd_driver={self.svd_driver!r} is unknown; expected one of {list(DRIVERS)} or None")

    def rank(self, s: Tensor) -> int:
        """How many of the singular values s, in falling order, are kept."""
        rank = len(s)
        if self.max_error is not None:
            tails = s.double().square().flip(0).cumsum(0).sqrt()  # of the last 1, 2, ... values
            rank -= int((tails <= self.max_error * tails[-1]).sum())
        return max(1, min(rank, self.svd_rank or rank))


def truncate_product(b: Tensor, a: Tensor, how: Truncation) -> LowRank:
    """The best approximation of B (out, R) times A (R, cols), without building the product.

    Where dense decompositions cost O(out cols min(out, cols)), this costs O((out + cols) R^2): with C C^T = A A^T, the
    singular values of B C are those of B A, and the eigenvectors P of C^T B^T B C turn B into the left factor B C P.
    Products of matrices with themselves square the condition, so they are taken in float64: relative to the largest
    singular value the result is good to 1e-7.
    """
    gram_b, gram_a = _gram(b.T), _gram(a)
    c, failed = torch.linalg.cholesky_ex(gram_a)
    if failed:  # A has no full rank
        values, vectors = torch.linalg.eigh(gram_a)
        c = vectors * values.clamp(min=0).sqrt()
    squares, p = torch.linalg.eigh(c.T @ gram_b @ c)
    squares, p = squares.flip(0).clamp(min=0), p.flip(1)
    s = squares.sqrt()
    rank = min(how.rank(s), *b.shape, *a.shape)
    left = c @ p[:, :rank]  # (R, rank)
    inverse = torch.where(s[:rank] > 1e-7 * s[0], 1 / squares[:rank], 0.0)
    right = inverse[:, None] * (left.T @ gram_b)  # (rank, R)
    found = b @ left.to(b), right.to(a) @ a
    error, norm = s[rank:].norm().item(), s.norm().item()
    if how.svd_clamp is None:
        return LowRank(*found, error, norm)
    found = _clamped(*found, how.svd_clamp)
    return LowRank(*found, _product_norm(torch.cat([b, -found[0]], 1), torch.cat([a, found[1]])), norm)


def truncate(matrix: Tensor, how: Truncation) -> LowRank:
    """The best approximation of a dense matrix.

    For a rank far below the sides it is found by iterating (see `_leading`), else by a full decomposition.
    """
    found = _leading(matrix, how.svd_rank) if how.svd_rank and how.max_error is None and not how.svd_driver else None
    if found is None:
        driver = how.svd_driver if matrix.is_cuda else None
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
        rank = how.rank(s)
        found = u[:, :rank] * s[:rank], vh[:rank]
    if how.svd_clamp is not None:
        found = _clamped(*found, how.svd_clamp)
    b, a = found
    return LowRank(b, a, _norm(torch.addmm(matrix, b, a, alpha=-1)), _norm(matrix))


def _leading(matrix: Tensor, rank: int, tolerance: float = 1e-6) -> tuple[Tensor, Tensor] | None:
    """Factors U S and V^T of the leading `rank` singular triples by block Krylov iteration (Musco and Musco 2015,
    arXiv:1504.05477), or None where a full decomposition is cheaper.

    It stops when a step adds less than `tolerance` of what is left over to the energy that the factors hold. Measured
    on pruned and on Gaussian matrices the error of the result then exceeds the optimum by less than 1e-6 of it; where
    the optimum is below 1e-5 of the matrix's norm, by less than that. The start is seeded: same matrix, same result.
    """
    if matrix.shape[0] < matrix.shape[1]:
        found = _leading(matrix.T, rank, tolerance)
        if found is None:
            return None
        s = found[0].norm(dim=0).clamp(min=torch.finfo(matrix.dtype).tiny)
        return found[1].T * s, (found[0] / s).T
    rows, cols = matrix.shape
    width = rank + OVERSAMPLING
    if width > ITERATE_BELOW * cols:
        return None
    generator = torch.Generator().manual_seed(0)
    block = torch.linalg.qr(torch.randn(cols, width, generator=generator).to(matrix))[0]
    basis, images = matrix.new_empty(cols, 0), matrix.new_empty(rows, 0)  # V, and the matrix times V
    total, held = _norm(matrix) ** 2, 0.0
    while basis.shape[1] + width <= cols // 2:
        image = matrix @ block
        basis, images = torch.cat([basis, block], 1), torch.cat([images, image], 1)
        values, vectors = torch.linalg.eigh(_gram(images.T))
        before, held = held, values[-rank:].sum().item()
        if held - before <= max(tolerance * (total - held), 1e-10 * total):
            v = basis @ vectors.flip(1)[:, :rank].to(basis)  # (cols, rank)
            return matrix @ v, v.T
        block = matrix.T @ image
        for _ in range(2):  # once more after normalising: a block that has little new left is mostly rounding
            block = block - basis @ (basis.T @ block)
            block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
    return None


def _double(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _gram(rows: Tensor) -> Tensor:
    """M M^T in float64."""
    rows = _double(rows)
    return rows @ rows.T


def _norm(matrix: Tensor) -> float:
    """Frobenius norm: by rows, which float32 sums well, and those in float64."""
    return _double(matrix.norm(dim=1)).norm().item()


def _product_norm(b: Tensor, a: Tensor) -> float:
    """Frobenius norm of B A."""
    square = (_gram(b.T) * _gram(a)).sum()
    return square.clamp(min=0).sqrt().item()


def _clamped(b: Tensor, a: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Both factors within one limit, a quantile of their entries together."""
    entries = torch.cat([b.flatten(), a.flatten()]).sort().values  # torch.quantile takes no more than 2^24
    place = quantile * (len(entries) - 1)
    limit = torch.lerp(entries[int(place)], entries[ceil(place)], place % 1)
    return b.clamp(-limit, limit), a.clamp(-limit, limit)
