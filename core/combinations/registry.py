"""What a combination is: one function and what it declares.

There are three ways to write one, of which the second and the third take any function that merges tensors:

    @combination(name)     parts of one layer -> LowRank
    @on_factors(name)      the same function on the adapters' B and on their A
    @on_deltas(name)       on what each adapter adds to the weight; the result is truncated to a LoRA

Its keyword-only parameters are the options that it reads. Two names are supplied rather than read: `generator`, a
seeded one for the layer where the option `seed` is given (else None, which draws from torch's global state), and `cut`,
a `Truncation` made of the options that `Truncation` has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from inspect import Parameter, getdoc, signature
from math import copysign, nan, sqrt
from typing import Any, TypeVar
from zlib import crc32

import torch
from torch import Tensor

from ..adapter import Adapter, Dense, wide
from ..errors import NotMergeableError
from ..layer import AdaptedLayer
from ..lowrank import LowRank, Truncation, truncate
from ..stack import fold

REQUIRED = Parameter.empty
"""Stands for the default of an option that has none."""


class Part:
    """One adapter of one layer, and the weight that it gets there."""

    def __init__(self, adapter: Adapter, layer: AdaptedLayer, weight: float):
        self.adapter, self.layer, self.weight = adapter, layer, weight

    @property
    def method(self) -> str:
        """The name of its method, for messages."""
        return type(self.adapter).__name__

    @property
    def gain(self) -> float:
        """What its factors are multiplied by to give its delta: its scale, times its strength."""
        return self.adapter.gain if isinstance(self.adapter, Dense) else 1.0

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """B (out, r) and A (r, cols) in float32 at least, where its delta is exactly gain B A for a small r."""
        found = self.adapter.factors() if isinstance(self.adapter, Dense) else None
        return None if found is None else (wide(found[0].detach()), wide(found[1].detach()))

    @cached_property
    def rank(self) -> int | None:
        """The r of its factors, or None without."""
        factors = self.adapter.factors() if isinstance(self.adapter, Dense) else None
        return None if factors is None else factors[0].shape[1]

    def delta(self) -> Tensor:
        """What it adds to the weight (out, cols), its scale included and its weight not, in float32 at least.

        For a method that is no sum this is its folded weight less the original one.
        """
        if isinstance(self.adapter, Dense):
            return self.gain * wide(self.adapter.delta().detach())
        weight, _ = self._original()
        return fold(self.adapter, weight, None)[0] - weight

    @property
    def changes_bias(self) -> bool:
        """Whether it may change the layer's bias."""
        return self.adapter.moves_bias if isinstance(self.adapter, Dense) else True

    def bias_delta(self) -> Tensor | None:
        """What it adds to the bias (out,), or None for nothing."""
        if not self.changes_bias:
            return None
        weight, bias = self._original()
        folded = fold(self.adapter, weight, bias)[1]
        if folded is None or bias is None:
            return folded
        return None if torch.equal(folded, bias) else folded - bias

    def _original(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.layer.original()
        return wide(weight.detach()), None if bias is None else wide(bias.detach())


Parts = Sequence[Part]
Check = Callable[[Parts], str | None]
"""Why the parts of one layer cannot be combined so, or None if they can."""
Merge = Callable[..., Tensor]
"""(tensors of one shape, their weights, options as keywords) -> the tensor that they become."""
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Combination:
    """A way to combine the adapters of one layer."""

    name: str
    about: str
    """What it does, from its function's docstring."""
    function: Callable[..., LowRank]
    """(parts, options as keywords) -> the combined delta."""
    parameters: tuple[Parameter, ...]
    adapters: int | None = None
    """How many adapters it takes; None for any number."""
    checks: tuple[Check, ...] = ()

    @cached_property
    def options(self) -> dict[str, Any]:
        """The options that it reads, with their defaults, `REQUIRED` where it has none."""
        supplied = {"generator": {"seed": None}, "cut": {f.name: f.default for f in fields(Truncation)}}
        found: dict[str, Any] = {}
        for parameter in self.parameters:
            found |= supplied.get(parameter.name, {parameter.name: parameter.default})
        return found

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise `ValueError` for an option that it does not read, or without one that it needs."""
        foreign = sorted(options.keys() - self.options.keys())
        if foreign:
            raise ValueError(f"{self.name!r} has no option {', '.join(foreign)}; it reads {sorted(self.options)}")
        lacking = [n for n, d in self.options.items() if d is REQUIRED and options.get(n) is None]
        if lacking:
            raise ValueError(f"{self.name!r} needs {', '.join(lacking)}")

    def reason_against(self, layers: Mapping[str, Parts], adapters: int) -> str | None:
        """Why these adapters, by layer path, cannot be combined so; None if they can.

        adapters: how many there are in all, whatever they target.
        """
        if self.adapters not in (None, adapters):
            return f"{self.name!r} takes {self.adapters} adapters, not {adapters}"
        for path, parts in layers.items():
            for check in (_folds, *self.checks):
                reason = check(parts)
                if reason is not None:
                    return f"{path}: {reason}"
        return None

    def __call__(self, parts: Parts, path: str, **options: Any) -> LowRank:
        """The combined delta of the layer at `path`."""
        keywords = {name: value for name, value in options.items() if name not in _SUPPLIED}
        names = {parameter.name for parameter in self.parameters}
        if "cut" in names:
            keywords["cut"] = Truncation(**{f.name: options[f.name] for f in fields(Truncation) if f.name in options})
        if "generator" in names:
            keywords["generator"] = _generator(options.get("seed"), path, parts[0].layer.site.device)
        return self.function(parts, **keywords)


COMBINATIONS: dict[str, Combination] = {}
_SUPPLIED = {"seed", *(f.name for f in fields(Truncation))}


def _generator(seed: int | None, path: str, device: torch.device) -> torch.Generator | None:
    """Draws for one layer, which do not depend on the layers before it."""
    # crc32, since torch's CPU generator takes no more than 32 bits of a seed into account
    return None if seed is None else torch.Generator(device).manual_seed(crc32(f"{seed} {path}".encode()))


def _register(name: str, written: Callable[..., Any], **declared: Any) -> None:
    about = " ".join((getdoc(written) or "").partition("\n\n")[0].split())
    COMBINATIONS[name] = Combination(name, about, **declared)


def _keywords(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    return tuple(p for p in signature(function).parameters.values() if p.kind is Parameter.KEYWORD_ONLY)


def combination(name: str, *, adapters: int | None = None, checks: Iterable[Check] = ()) -> Callable[[F], F]:
    """Register a function from the parts of a layer to their combination."""

    def register(function: F) -> F:
        _register(
            name, function, function=function, parameters=_keywords(function), adapters=adapters, checks=tuple(checks)
        )
        return function

    return register


def on_factors(name: str, *, adapters: int | None = None, checks: Iterable[Check] = ()) -> Callable[[F], F]:
    """Register a function that merges tensors, applied to the adapters' B and A apart.

    Each factor gets the root of its adapter's weight and scale, one of them with the sign: PEFT's definition.
    """

    def register(merge: F) -> F:
        def run(parts: Parts, **options: Any) -> LowRank:
            scaled = [part.weight * part.gain for part in parts]
            roots = [sqrt(abs(weight)) for weight in scaled]
            signed = [copysign(root, weight) for root, weight in zip(roots, scaled, strict=True)]
            factors = [found for part in parts if (found := part.factors) is not None]  # of all: `equal_ranks` asked
            a = merge([a for _, a in factors], signed, **options)  # A before B: the order of PEFT's random draws
            return LowRank(merge([b for b, _ in factors], roots, **options), a, nan, nan)

        needs = (equal_ranks, *checks)
        _register(name, merge, function=run, parameters=_keywords(merge), adapters=adapters, checks=needs)
        return merge

    return register


def on_deltas(name: str, *, adapters: int | None = None, checks: Iterable[Check] = ()) -> Callable[[F], F]:
    """Register a function that merges tensors, applied to the adapters' deltas, one layer at a time."""

    def register(merge: F) -> F:
        def run(parts: Parts, *, cut: Truncation, **options: Any) -> LowRank:
            weights = [part.weight for part in parts]
            return truncate(merge([part.delta() for part in parts], weights, **options), cut)

        cut = Parameter("cut", Parameter.KEYWORD_ONLY)
        parameters = (*_keywords(merge), cut)
        _register(name, merge, function=run, parameters=parameters, adapters=adapters, checks=tuple(checks))
        return merge

    return register


def _folds(parts: Parts) -> str | None:
    site = parts[0].layer.site
    if site.elementwise:
        return f"a {type(site.module).__name__} has no matrix, so no LoRA can change it"
    for part in parts:
        try:
            part.adapter.check_mergeable()
        except NotMergeableError as error:
            return str(error)
    return None


def equal_ranks(parts: Parts) -> str | None:
    """Factors are merged entry by entry, which needs factors, of equal shapes."""
    ranks = [part.rank for part in parts]
    dense = [part.method for part in parts if part.rank is None]
    if dense:
        return f"{dense[0]} has no factors to merge: use a kind that works on deltas, such as 'svd'"
    if len(set(ranks)) > 1:
        return f"ranks {ranks} differ, and factors are merged entry by entry: use 'cat', 'svd' or a kind on deltas"
    return None
