"""Adapters prepared to change without their tensors changing shape: padded to one rank, with tensors for scales.

A padded adapter has zeros in the place of further ranks, which change nothing. `Adapter.true_shapes` remembers what its
file would hold; an adapter that stands for none (its layer is not among those of the file) has no true shapes at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .config import PeftConfig, RankedConfig

META = torch.device("meta")


def corner(tensor: Tensor, shape: Iterable[int]) -> Tensor:
    """The part of `tensor` that a smaller one of this shape fills."""
    return tensor[tuple(map(slice, shape))]


def trim(adapters: Mapping[str, Adapter], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of adapters, by path, as their file has them: without padding, and without those that stand for none."""
    trimmed = dict(tensors)
    for path, adapter in adapters.items():
        if adapter.true_shapes is None:
            continue
        for key, _, _ in adapter.slots():
            name = f"{path}.{key}"
            if key not in adapter.true_shapes:
                del trimmed[name]
            elif trimmed[name].shape != adapter.true_shapes[key]:
                trimmed[name] = corner(trimmed[name], adapter.true_shapes[key]).contiguous()
    return trimmed


def pad(adapters: Mapping[str, Adapter], tensors: dict[str, Tensor]) -> tuple[dict[str, Adapter], dict[str, Tensor]]:
    """The other way round: the adapters that stand for something, and what `trim` gave of them in their own shapes."""
    present = {path: adapter for path, adapter in adapters.items() if adapter.true_shapes != {}}
    padded = dict(tensors)
    for path, adapter in present.items():
        if adapter.true_shapes is None:
            continue
        for key, held, k in adapter.slots():
            given = tensors.get(f"{path}.{key}")
            if given is not None and given.shape == adapter.true_shapes[key] != held[k].shape:
                padded[f"{path}.{key}"] = given.new_zeros(held[k].shape)
                corner(padded[f"{path}.{key}"], given.shape).copy_(given)
    return present, padded


def scaled(adapter: Adapter) -> Any:
    """The part of an adapter that has a scale of its own (of DoRA: the direction), or None."""
    return next((m for m in adapter.modules() if "scaling" in vars(m)), None)


@torch.no_grad()
def prepare(adapter: Adapter, config: PeftConfig, path: str, rank: int | None) -> None:
    """Make the scale a tensor, and pad to `rank`, which methods of fixed shapes don't need.

    Raises:
        ValueError: its rank is larger, or its tensors have other names at that rank.
    """
    part = scaled(adapter)
    if part is not None and not isinstance(part.scaling, Tensor):
        dtype = torch.promote_types(adapter.dtype, torch.float32)
        part.__dict__["scaling"] = torch.tensor(float(part.scaling), dtype=dtype, device=adapter.site.device)
    slots = {key: (held, k) for key, held, k in adapter.slots()}
    if adapter.true_shapes is None:
        adapter.true_shapes = {key: tuple(held[k].shape) for key, (held, k) in slots.items()}
    if rank is None or not adapter.paddable or not isinstance(config, RankedConfig):
        return
    padded = replace(config, r=rank, rank_pattern={}).build(adapter.site, path, META, adapter.dtype)
    shapes = {key: held[k].shape for key, held, k in padded.slots()}
    if shapes.keys() != slots.keys():
        raise ValueError(f"{path} holds {sorted(slots)}, but {sorted(shapes)} at rank {rank}: choose another rank")
    for key, (held, k) in slots.items():
        old, shape = held[k], shapes[key]
        if any(n > m for n, m in zip(old.shape, shape, strict=True)):
            raise ValueError(f"{path} has {key} of shape {tuple(old.shape)}, too large for rank {rank}: {tuple(shape)}")
        if old.shape != shape:
            new = old.new_zeros(shape)
            corner(new, old.shape).copy_(old)
            held[k] = nn.Parameter(new, requires_grad=old.requires_grad)
