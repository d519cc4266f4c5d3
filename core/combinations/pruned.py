"""Sums of pruned adapters: most of what an adapter changes is not needed, and what is left interferes less.

Each function is the paper's on any tensors; PEFT applies them to the factors ("ties") and to the deltas ("ties_svd").
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import on_deltas, on_factors
from .sums import weighted_sum

TILE = 2**15
"""Entries that an election works on at a time, so that they stay in a processor's cache through its dozen passes."""
Majority = Literal["total", "frequency"]
"""How the sign of an entry is elected: by the sum of the values, or by the sum of their signs."""


@on_deltas("magnitude_prune_svd")
@on_factors("magnitude_prune")
def magnitude_prune(tensors: list[Tensor], weights: list[float], *, density: float) -> Tensor:
    """The weighted sum of each adapter's largest entries, a share `density` of them."""
    return weighted_sum([largest(t, density) for t in tensors], weights)


@on_deltas("ties_svd")
@on_factors("ties")
def ties(
    tensors: list[Tensor], weights: list[float], *, density: float, majority_sign_method: Majority = "total"
) -> Tensor:
    """TIES (Yadav et al. 2023, arXiv:2306.01708): keep the largest entries, elect a sign for each place, average the
    entries that agree with it."""
    return agreed([largest(t, density) for t in tensors], weights, majority_sign_method)


@on_deltas("dare_linear_svd")
@on_factors("dare_linear")
def dare_linear(
    tensors: list[Tensor], weights: list[float], *, density: float, generator: torch.Generator | None
) -> Tensor:
    """DARE (Yu et al. 2023, arXiv:2311.03099): the weighted sum of random entries, a share `density` of them, made
    larger to keep the expectation."""
    return weighted_sum([at_random(t, density, generator) for t in tensors], weights)


@on_deltas("dare_ties_svd")
@on_factors("dare_ties")
def dare_ties(
    tensors: list[Tensor],
    weights: list[float],
    *,
    density: float,
    majority_sign_method: Majority = "total",
    generator: torch.Generator | None,
) -> Tensor:
    """DARE's random entries, then the elected signs of TIES."""
    return agreed([at_random(t, density, generator) for t in tensors], weights, majority_sign_method)


@on_deltas("della")
def della(
    deltas: list[Tensor],
    weights: list[float],
    *,
    density: float,
    epsilon: float = 0.1,
    majority_sign_method: Majority = "total",
    generator: torch.Generator | None,
) -> Tensor:
    """DELLA (Deep et al. 2024, arXiv:2406.11617): as "dare_ties", but large entries of a row are likelier to stay.

    Along a row, which is all that one output feature takes in, the chance to be kept rises with the rank of an entry's
    magnitude from `density - epsilon / 2` to `density + epsilon / 2`; what is kept is divided by its chance.
    """
    if not 0 <= epsilon / 2 <= min(_share(density), 1 - density):
        raise ValueError(f"epsilon={epsilon} takes the chances density -+ epsilon / 2 beyond 0 and 1 at {density=}")
    return agreed([_by_chance(d, density, epsilon, generator) for d in deltas], weights, majority_sign_method)


def _by_chance(delta: Tensor, density: float, epsilon: float, generator: torch.Generator | None) -> Tensor:
    places = delta.abs().argsort(1).argsort(1).to(delta.dtype)  # 0 for the smallest of a row
    chance = density - epsilon / 2 + epsilon * places / max(delta.shape[1] - 1, 1)
    return delta * torch.bernoulli(chance.clamp(0, 1), generator=generator) / chance.clamp(min=1e-12)


@on_deltas("breadcrumbs")
def breadcrumbs(deltas: list[Tensor], weights: list[float], *, density: float, gamma: float = 0.01) -> Tensor:
    """Model breadcrumbs (Davari and Belilovsky 2023, arXiv:2312.06795): the weighted sum of each adapter's middling
    entries.

    A share `gamma` of the largest, outliers, goes, and of the rest the smallest, until a share `density` is left.
    """
    if not 0 <= gamma < 1 or _share(density) + gamma > 1:
        raise ValueError(f"{gamma=} of the entries cannot go where {density=} of them stay: they exceed 1 together")
    return weighted_sum([_largest(d, density + gamma) - _largest(d, gamma) for d in deltas], weights)


def _share(density: float) -> float:
    if not 0 < density <= 1:
        raise ValueError(f"density={density} is no share of the entries to keep: give a number above 0, at most 1")
    return density


def largest(tensor: Tensor, density: float) -> Tensor:
    """The tensor with only its largest entries by magnitude; what equals the smallest of them stays too."""
    return _largest(tensor, _share(density))


def _largest(tensor: Tensor, share: float) -> Tensor:
    count = int(share * tensor.numel())
    if count == 0:
        return torch.zeros_like(tensor)
    threshold = _nth_largest(tensor.abs().flatten(), count)
    below = torch.nextafter(threshold, torch.zeros_like(threshold)).item()
    return F.hardshrink(tensor, below) if below > 0 else tensor  # in one pass, where masks take several


def _nth_largest(values: Tensor, n: int) -> Tensor:
    """The n-th largest of numbers (size,), which are left in disorder."""
    place = len(values) - n
    if values.device.type != "cpu":
        return values.kthvalue(place + 1).values
    values.numpy().partition(place)  # several times as fast as torch's, which a pruned blend would wait for
    return values[place]


def at_random(tensor: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """The tensor with random entries left, divided by the chance to stay."""
    if _share(density) == 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


def agreed(tensors: list[Tensor], weights: list[float], method: Majority) -> Tensor:
    """For each place the mean of the weighted entries whose sign is the elected one; weights have no vote."""
    if method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method={method!r} is neither 'total' nor 'frequency'")
    found = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    size = TILE if found.device.type == "cpu" else max(found.numel(), 1)
    tiles = [tensor.reshape(-1).split(size) for tensor in (found, *tensors)]
    for out, *entries in zip(*tiles, strict=True):
        votes = weighted_sum(entries if method == "total" else [e.sign() for e in entries], [1.0] * len(entries))
        sign = torch.copysign(torch.ones_like(votes), votes)
        agreeing = [F.relu(entry * sign) for entry in entries]  # magnitudes, and 0 for what disagrees
        total = weighted_sum(agreeing, weights).mul_(sign)
        count = weighted_sum([a.sign_() for a in agreeing], [1.0] * len(entries))
        torch.div(total, count.clamp_(min=1), out=out)
    return found
