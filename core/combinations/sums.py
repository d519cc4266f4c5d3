r"""Weighted sums $\sum_i w_i \Delta W_i$: exact, at a lower rank, factor by factor; and the walk along an arc."""

from __future__ import annotations

from math import sin

import torch
from torch import Tensor

from ..lowrank import LowRank, Truncation, truncate, truncate_product
from .registry import Part, Parts, combination, on_deltas, on_factors


@combination("cat")
def cat(parts: Parts) -> LowRank:
    r"""The exact weighted sum: factors side by side, so that ranks add up.

    A delta without low-rank factors keeps its full rank.
    """
    factors = [_weighted(part) for part in parts]
    return LowRank(torch.cat([b for b, _ in factors], 1), torch.cat([a for _, a in factors]))


def _weighted(part: Part) -> tuple[Tensor, Tensor]:
    """B and A with B A the part's delta at its weight; for a dense delta one of them is the identity."""
    factors = part.factors
    if factors is not None:
        b, a = factors
        return b, part.weight * part.gain * a
    delta = part.weight * part.delta()
    eye = torch.eye(min(delta.shape), dtype=delta.dtype, device=delta.device)
    return (eye, delta) if delta.shape[0] < delta.shape[1] else (delta, eye)


@combination("svd")
def svd(parts: Parts, *, cut: Truncation) -> LowRank:
    """The weighted sum at a chosen rank: of all matrices of that rank the nearest (Eckart and Young).

    Where all adapters have factors, and thin ones, no matrix of the weight's size is built.
    """
    rows, cols = parts[0].layer.site.out, parts[0].layer.site.cols
    ranks = [part.rank for part in parts]
    if None not in ranks and 2 * sum(ranks) <= min(rows, cols):  # type: ignore[arg-type]  # wider ones cost more so
        exact = cat(parts)
        return truncate_product(exact.b, exact.a, cut)
    total = torch.zeros((), device=parts[0].layer.site.device)
    for part in parts:  # one delta at a time
        total = part.delta().mul_(part.weight).add_(total)
    return truncate(total, cut)


@on_factors("linear")
def weighted_sum(tensors: list[Tensor], weights: list[float]) -> Tensor:
    r"""Factors added apart, with roots of weights: $(\sum_i \sqrt{w_i} B_i)(\sum_i \sqrt{w_i} A_i)$.

    That is not the sum of the products: it has cross terms. PEFT's definition, kept for its files' users; prefer "cat"
    or "svd".
    """
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total


def _forward(parts: Parts) -> str | None:
    behind = [part.weight for part in parts if part.weight < 0]
    return f"'slerp' goes from one adapter to the other, where no weight is {behind[0]}" if behind else None


@on_deltas("slerp", adapters=2, checks=[_forward])
def slerp(deltas: list[Tensor], weights: list[float]) -> Tensor:
    r"""Between two adapters along an arc rather than a line (Shoemake 1985), so that what they agree on keeps its size.

    With weights $w_1, w_2$ the way goes to $t = w_2 / (w_1 + w_2)$, and the whole is as strong as their sum: (1, 0) and
    (0, 1) are the adapters, (0.5, 0.5) is half way. With $\omega$ the angle between the deltas,
    $(w_1 + w_2) (\sin((1 - t) \omega) \Delta_1 + \sin(t \omega) \Delta_2) / \sin \omega$. Parallel deltas, and a layer
    that only one adapter has, take the weighted sum.
    """
    norms = [delta.norm() for delta in deltas]
    if len(deltas) < 2 or sum(weights) == 0 or not all(norms):
        return weighted_sum(deltas, weights)
    cosine = (deltas[0].flatten() @ deltas[1].flatten() / norms[0] / norms[1]).clamp(-1, 1)
    angle, strength = cosine.arccos().item(), sum(weights)
    if sin(angle) < 1e-3:
        return weighted_sum(deltas, weights)
    return weighted_sum(deltas, [strength * sin(w / strength * angle) / sin(angle) for w in weights])
