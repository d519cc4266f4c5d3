"""A weighted sum of IA3 adapters, which is an IA3 adapter again: their vectors are added."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .adapted import AdaptedModel
from .adapter import wide
from .combine import Sources
from .tuners.ia3 import IA3Config
from .weights import Weight


def are_vectors(handle: AdaptedModel, names: Iterable[str]) -> bool:
    """Whether all these adapters are IA3's."""
    return all(isinstance(handle.configs.get(name), IA3Config) for name in names)


def add_vectors(handle: AdaptedModel, names: Sequence[str], weights: Sequence[Weight], new_name: str) -> None:
    r"""Add the frozen IA3 adapter $l = \sum_i w_i l_i$, a layer that only some target from those, as PEFT does.

    Weights that sum to 1 blend; the sum of two adapters at 1 each is no identity where both are.

    Raises:
        ValueError: adapters that scale different sides of one layer, or that train modules whole; a count of weights
            that is not that of the adapters. Nothing has changed then.
    """
    configs: list[Any] = [handle.configs[name] for name in names]
    if any(config.modules_to_save for config in configs):
        raise ValueError(
            "modules trained whole have no vectors to add: use combination_type='svd', which adds those too"
        )
    total: dict[str, Tensor] = {}
    for path, parts in Sources(handle, names, weights).parts.items():
        for each in parts:
            own: Any = each.adapter
            vector = torch.lerp(torch.ones_like(own.ia3_l), own.ia3_l.detach(), own.strength)
            key, part = f"{path}.ia3_l", each.weight * wide(vector)
            if key in total and total[key].shape != part.shape:
                raise ValueError(f"{path}: some of {list(names)} scale its input and others its output")
            total[key] = part if key not in total else total[key] + part
    first = configs[0]
    chosen = {field: _union([getattr(c, field) for c in configs], field) for field in _FIELDS}
    config = replace(first, **chosen, exclude_modules=None if len(configs) > 1 else first.exclude_modules)
    handle.load(new_name, config, total)


_FIELDS = ("target_modules", "feedforward_modules")


def _union(values: list[Any], field: str) -> Any:
    """Suffixes of all, or a regex for any; whatever does not select the same layers fails when it is loaded."""
    if all(isinstance(value, str) for value in values):
        return "|".join(f"({value})" for value in dict.fromkeys(values))
    if any(isinstance(value, str) for value in values):
        raise ValueError(f"some adapters have a regex as {field}, and others names: their sum would have neither")
    return set().union(*values)
