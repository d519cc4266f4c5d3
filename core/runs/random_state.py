"""Randomness by counting: every draw follows from the run's seed and from what it is for, never from what came before.

There is no random state to save, so a resumed run equals an undisturbed one by construction, samples cannot disturb
training, and processes draw different numbers without talking to each other.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, such as `(0, "noise", 17)`; the same on every platform and in every version."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose: draws do not depend on the device that they are used on."""
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


def shuffled(seed: int, name: str, size: int, position: int, count: int) -> Tensor:
    """Items `position .. position + count - 1` of an endless sequence that visits all `size` items once an epoch, each
    epoch in a new order: (count,) of int64. This is the whole data cursor."""
    places = range(position, position + count)
    epochs = {place // size for place in places}
    orders = {epoch: torch.randperm(size, generator=generator(seed, name, epoch)) for epoch in epochs}
    return torch.stack([orders[place // size][place % size] for place in places])
