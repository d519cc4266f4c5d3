"""The registry of LoRA's initialisations: functions of an adapter and its base weight, found by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import offload
from ..sites import Site


class Start(NamedTuple):
    """What an adapter starts from."""

    b: Tensor  # (out, r)
    a: Tensor  # (r, cols)
    base: Tensor | None = None
    """A weight (out, cols) that takes the place of the base's while the adapter is there."""


class Lora(Protocol):
    """What an initialisation may ask of the adapter."""

    config: Any
    site: Site
    path: str
    r: int
    scaling: float


@dataclass(frozen=True)
class Initialisation:
    """A way to compute the factors that a LoRA starts from."""

    name: str
    pattern: re.Pattern[str]
    compute: Callable[..., Start]
    subtracts: bool
    """Whether the adapter's change is $B A - B_0 A_0$, so that training starts from the base model although B A is not
    zero. PEFT subtracts $B_0 A_0$ from the base weight instead, where it stays."""
    replaces_base: bool
    """Whether `Start.base` is used. Only one such adapter can be at a layer."""

    def __call__(self, lora: Lora, name: str) -> Start:
        weight = lora.site.read()[0].detach()
        weight = weight.to(offload.compute_device(lora.config, weight))
        groups = {key: int(value) for key, value in self.match(name).groupdict().items() if value is not None}
        with torch.no_grad():
            return self.compute(lora, weight.to(torch.promote_types(weight.dtype, torch.float32)), **groups)

    def match(self, name: str) -> re.Match[str]:
        found = self.pattern.fullmatch(name)
        assert found is not None
        return found


INITIALISATIONS: dict[str, Initialisation] = {}


def initialisation(
    name: str, pattern: str | None = None, *, subtracts: bool = False, replaces_base: bool = False
) -> Callable[[Callable[..., Start]], Callable[..., Start]]:
    """Decorator: register a function (adapter, W (out, cols) in float32 at least, **numbers) -> `Start`.

    pattern: a regex for names with numbers in them, which are passed on by group name.
    """

    def add(compute: Callable[..., Start]) -> Callable[..., Start]:
        compiled = re.compile(pattern or re.escape(name))
        INITIALISATIONS[name] = Initialisation(name, compiled, compute, subtracts, replaces_base)
        return compute

    return add


def check_rank(lora: Lora, weight: Tensor, method: str) -> None:
    """Raise `ValueError` if the weight has not as many singular directions as the adapter's rank asks for."""
    if lora.r > min(weight.shape):
        raise ValueError(
            f"{lora.path}: {method} takes r={lora.r} directions of a weight of shape {tuple(weight.shape)}, which has "
            f"only {min(weight.shape)}: lower r, or give this layer a smaller one in rank_pattern"
        )
