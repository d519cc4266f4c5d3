"""Truncations against float64 singular value decompositions."""

import pytest
import torch
from torch import Tensor
from veneer.core.lowrank import ITERATE_BELOW, OVERSAMPLING, Truncation, truncate, truncate_product


def spectrum(values: Tensor, rows: int, cols: int) -> Tensor:
    """A random float32 matrix with these singular values."""
    u, v = (torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))[0] for n in (rows, cols))
    return (u * values @ v.T).float()


def sparse(rows: int, cols: int, share: float) -> Tensor:
    """Three low-rank matrices of which random entries are left."""
    return sum(torch.randn(rows, 8) @ torch.randn(8, cols) * (torch.rand(rows, cols) < share) for _ in range(3))


MATRICES = {
    "gaussian": lambda m, n: torch.randn(m, n),
    "sparse": lambda m, n: sparse(m, n, 0.3),
    "power law": lambda m, n: spectrum(torch.arange(1, min(m, n) + 1).double() ** -1, m, n),
    "exponential": lambda m, n: spectrum(torch.logspace(0, -12, min(m, n)).double(), m, n),
    "a cluster": lambda m, n: spectrum(torch.ones(min(m, n)).double(), m, n),
    "of low rank": lambda m, n: torch.randn(m, 3) @ torch.randn(3, n),
    "of just that rank": lambda m, n: torch.randn(m, 4) @ torch.randn(4, n),
    "low rank and noise": lambda m, n: torch.randn(m, 6) @ torch.randn(6, n) + 1e-3 * torch.randn(m, n),
    "one entry": lambda m, n: torch.nn.functional.pad(torch.ones(1, 1), (3, n - 4, 5, m - 6)),
    "zero": lambda m, n: torch.zeros(m, n),
}


@pytest.mark.parametrize("shape", [(240, 240), (400, 200), (200, 400)], ids=str)
@pytest.mark.parametrize("matrix", MATRICES)
def test_iterating_is_as_good_as_decomposing(matrix, shape):
    """To 1e-5 of the least error, or to float32 rounding."""
    torch.manual_seed(0)
    target, rank = MATRICES[matrix](*shape), 4
    assert rank + OVERSAMPLING <= ITERATE_BELOW * min(shape)
    found = truncate(target, Truncation(svd_rank=rank))
    assert (found.b.shape, found.a.shape) == ((shape[0], rank), (rank, shape[1]))
    error = (target.double() - found.b.double() @ found.a.double()).norm().item()
    least = torch.linalg.svdvals(target.double())[rank:].norm().item()
    assert error <= least * (1 + 1e-5) + 2e-6 * target.norm().item()
    assert found.error == pytest.approx(error, abs=1e-6 * target.norm().item())
    assert found.norm == pytest.approx(target.norm().item(), rel=1e-6)


def test_factors_are_singular_vectors():
    """B is U S and A is V^T, on both ways; so a driver's answer is the same up to signs."""
    torch.manual_seed(0)
    target = spectrum(torch.logspace(1, -1, 200).double(), 260, 200)
    for matrix in (target, target.T.contiguous()):
        found = truncate(matrix, Truncation(svd_rank=4))
        full = truncate(matrix, Truncation(svd_rank=4, svd_driver="gesvd"))
        torch.testing.assert_close(
            (found.b.T @ full.b).abs(), torch.diag(full.b.norm(dim=0) ** 2), atol=1e-2, rtol=1e-3
        )
        torch.testing.assert_close(found.a @ found.a.T, torch.eye(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.b @ found.a, full.b @ full.a, atol=1e-4, rtol=1e-3)


def test_same_matrix_same_result():
    target = sparse(240, 240, 0.3)
    one = truncate(target, Truncation(svd_rank=4))
    torch.rand(3)
    two = truncate(target, Truncation(svd_rank=4))
    assert torch.equal(one.b, two.b)


@pytest.mark.parametrize("condition", [1.0, 1e-3, 1e-7, 0.0])
@pytest.mark.parametrize("shape", [(50, 30), (30, 50)], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 12, 20])
def test_a_product_is_truncated_without_being_built(shape, condition, rank):
    """However ill-conditioned the factors are: two adapters may be nearly the same, or one zero."""
    torch.manual_seed(0)
    b, a = torch.randn(shape[0], 12), torch.randn(12, shape[1])
    b[:, 6:] = b[:, :6] + condition * b[:, 6:]
    a[3:] *= condition
    target = b.double() @ a.double()
    found = truncate_product(b, a, Truncation(svd_rank=rank))
    u, s, vh = torch.linalg.svd(target, full_matrices=False)
    best = u[:, :rank] * s[:rank] @ vh[:rank]
    assert found.b.isfinite().all()
    assert found.a.isfinite().all()
    assert (found.b.double() @ found.a.double() - best).norm() <= 1e-6 * s[0]
    assert found.error == pytest.approx(s[rank:].norm().item(), abs=1e-6 * s[0].item())


@pytest.mark.parametrize("max_error", [0.0, 1e-4, 0.03, 0.5, 0.99])
@pytest.mark.parametrize("by", ["product", "matrix"])
def test_rank_by_error(by, max_error):
    torch.manual_seed(0)
    target = spectrum(torch.logspace(0, -4, 12).double(), 40, 30)
    u, s, vh = torch.linalg.svd(target, full_matrices=False)
    cut = Truncation(max_error=max_error)
    found = truncate(target, cut) if by == "matrix" else truncate_product((u * s)[:, :12], vh[:12], cut)
    rank = found.b.shape[1]
    assert s[rank:].norm() <= max_error * s.norm() + 1e-6
    assert rank == 1 or s[rank - 1 :].norm() > max_error * s.norm()


@pytest.mark.parametrize("by", ["product", "matrix"])
def test_clamping_is_reported(by):
    torch.manual_seed(0)
    b, a = torch.randn(20, 5), torch.randn(5, 14)
    cut = Truncation(svd_rank=5, svd_clamp=0.9)
    found = truncate(b @ a, cut) if by == "matrix" else truncate_product(b, a, cut)
    limit = torch.cat([found.b.flatten(), found.a.flatten()]).abs().max()
    free = truncate(b @ a, Truncation(svd_rank=5)) if by == "matrix" else truncate_product(b, a, Truncation(svd_rank=5))
    torch.testing.assert_close(limit, torch.quantile(torch.cat([free.b.flatten(), free.a.flatten()]), 0.9))
    assert found.b.abs().eq(limit).sum() > 1
    assert found.error == pytest.approx((b @ a - found.b @ found.a).norm().item(), rel=1e-4)
    assert found.error > 0.01 * found.norm
