r"""Weighted combinations of adapters: several $\Delta W_i = B_i A_i$ with weights become one.

A combination is a function from `Part`s to factors of the new adapter, registered by its name; the new adapter has
scale 1. Everything is computed in float32 at least, whatever the adapters are kept in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import copysign, sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .adapter import Adapter, Dense, wide
from .tuners.dora import DoRA


class Part(NamedTuple):
    """One adapter of one layer: its factors, and its weight with its own scale multiplied in."""

    b: Tensor  # (out, r)
    a: Tensor  # (r, cols)
    weight: float


@dataclass(frozen=True)
class Options:
    """Options of the combinations, under PEFT's names."""

    svd_rank: int | None = None
    """Rank of an "svd" result; None takes the largest rank among the adapters."""
    svd_clamp: float | None = None
    """Quantile at which the factors of an "svd" are clamped; None does not clamp."""
    density: float | None = None
    """Share of the entries that "ties" keeps, in (0, 1]."""
    majority_sign_method: Literal["total", "frequency"] = "total"
    """How "ties" elects signs: by the sum of the values, or of their signs."""


Combination = Callable[[list[Part], Options], tuple[Tensor, Tensor]]
COMBINATIONS: dict[str, Combination] = {}
EQUAL_RANKS = {"linear", "ties"}
"""Combinations that add factors entry by entry, which only equal ranks allow."""


def combination(function: Combination) -> Combination:
    """Register a combination under its function's name."""
    COMBINATIONS[function.__name__] = function
    return function


@combination
def cat(parts: list[Part], options: Options) -> tuple[Tensor, Tensor]:
    r"""The exact sum $\sum_i w_i B_i A_i$, by putting the factors side by side; ranks add up."""
    return torch.cat([p.b for p in parts], 1), torch.cat([p.weight * p.a for p in parts])


@combination
def linear(parts: list[Part], options: Options) -> tuple[Tensor, Tensor]:
    r"""Factors added apart, each with the root of its weight: $(\sum_i \sqrt{w_i} B_i)(\sum_i \sqrt{w_i} A_i)$.

    Not the sum of the products: it has cross terms. PEFT's definition, kept for its files' users; prefer cat or svd.
    """
    weights_b, weights_a = _roots(parts)
    b = sum(w * p.b for w, p in zip(weights_b, parts, strict=True))
    a = sum(w * p.a for w, p in zip(weights_a, parts, strict=True))
    return b, a  # type: ignore[return-value]


@combination
def svd(parts: list[Part], options: Options) -> tuple[Tensor, Tensor]:
    """The best approximation of the exact sum among matrices of the chosen rank (Eckart-Young).

    With R the summed rank, the QR decompositions of the concatenated factors leave an R x R core to decompose:
    O((out + cols) R^2) where a dense SVD costs O(out * cols * min(out, cols)).
    """
    b, a = cat(parts, options)
    rank = options.svd_rank or max(p.b.shape[1] for p in parts)
    size = b.shape[1]
    if size < min(b.shape[0], a.shape[1]):
        (h_b, tau_b), (h_a, tau_a) = torch.geqrf(b), torch.geqrf(a.T)
        u, s, vh = torch.linalg.svd(h_b[:size].triu() @ h_a[:size].triu().T, full_matrices=False)
        u, vh = _times_q(h_b, tau_b, u[:, :rank]), _times_q(h_a, tau_a, vh[:rank].T).T
    else:
        u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
        u, vh = u[:, :rank], vh[:rank]
    u = u * s[:rank]
    if options.svd_clamp is not None:
        limit = torch.quantile(torch.cat([u.flatten(), vh.flatten()]), options.svd_clamp)
        u, vh = u.clamp(-limit, limit), vh.clamp(-limit, limit)
    return u, vh


def _times_q(reflectors: Tensor, tau: Tensor, x: Tensor) -> Tensor:
    """Q x for Q (n, R) as `geqrf` leaves it, as reflectors, and x (R, k): cheaper than to build Q first."""
    padded = x.new_zeros(len(reflectors), x.shape[1])
    padded[: len(x)] = x
    return torch.ormqr(reflectors, tau, padded)


@combination
def ties(parts: list[Part], options: Options) -> tuple[Tensor, Tensor]:
    """TIES (Yadav et al. 2023, arXiv:2306.01708) on the factors: trim to the largest entries, elect the sign of each
    entry, average what agrees with it."""
    weights_b, weights_a = _roots(parts)
    return _ties([p.b for p in parts], weights_b, options), _ties([p.a for p in parts], weights_a, options)


def _roots(parts: list[Part]) -> tuple[list[float], list[float]]:
    """Roots of the weights for B and A; one factor takes the sign, so that a negative weight negates the delta."""
    roots = [sqrt(abs(p.weight)) for p in parts]
    return roots, [copysign(root, p.weight) for root, p in zip(roots, parts, strict=True)]


def _ties(tensors: list[Tensor], weights: list[float], options: Options) -> Tensor:
    density = options.density
    if density is None or not 0 < density <= 1:
        raise ValueError(f"ties needs density, the share of entries to keep, in (0, 1]; got {density}")
    kept = torch.stack([_largest(t, density) for t in tensors])  # (adapters, *shape)
    votes = kept if options.majority_sign_method == "total" else kept.sign()
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    agrees = kept.sign() == elected
    scaled = kept * kept.new_tensor(weights).view(-1, *[1] * (kept.ndim - 1))
    return (scaled * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """The tensor with only its largest entries by magnitude."""
    size, count = tensor.numel(), int(density * tensor.numel())
    if count == 0:
        return torch.zeros_like(tensor)
    threshold = tensor.abs().flatten().kthvalue(size - count + 1).values
    return torch.where(tensor.abs() >= threshold, tensor, 0.0)


def part_of(adapter: Adapter, weight: float, path: str) -> Part:
    """Factors of one layer's adapter.

    Raises:
        ValueError: its method does not add a matrix to the weight.
    """
    if isinstance(adapter, DoRA) or not isinstance(adapter, Dense) or getattr(adapter.config, "lora_bias", False):
        kind = type(adapter).__name__ + (" with lora_bias" if isinstance(adapter, Dense) else "")
        raise ValueError(f"{path}: {kind} is not a matrix added to the weight, so it cannot be combined")
    factors = adapter.factors()
    if factors is None:
        delta = wide(adapter.delta())
        factors = delta, torch.eye(delta.shape[1], dtype=delta.dtype, device=delta.device)
    b, a = (wide(f.detach()) for f in factors)
    return Part(b, a, weight * adapter.gain)


@torch.no_grad()
def combine(
    adapters: dict[str, list[tuple[Adapter, float]]], kind: str, options: Options
) -> dict[str, tuple[Tensor, Tensor]]:
    """Combined factors B (out, r), A (r, cols) of every layer.

    Arguments:
        adapters: by layer path, the adapters there with their weights.
        kind: a name of `COMBINATIONS`.

    Raises:
        ValueError: an unknown kind, adapters that are no sums, or ranks that the kind cannot take.
    """
    if kind not in COMBINATIONS:
        raise ValueError(f"combination_type={kind!r} is unknown; known: {sorted(COMBINATIONS)}")
    if options.majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method={options.majority_sign_method!r} is neither 'total' nor 'frequency'")
    if options.svd_rank is not None and options.svd_rank < 0:
        raise ValueError(f"svd_rank={options.svd_rank} is no rank")
    combined = {}
    for path, weighted in adapters.items():
        parts = [part_of(adapter, weight, path) for adapter, weight in weighted]
        ranks = [p.b.shape[1] for p in parts]
        if kind in EQUAL_RANKS and len(set(ranks)) > 1:
            raise ValueError(
                f"{path}: ranks {ranks} differ, and {kind!r} adds factors entry by entry: use 'cat' or 'svd', which "
                "take any ranks"
            )
        combined[path] = COMBINATIONS[kind](parts, options)
    return combined
