"""Several adapters, of any methods, become one LoRA: `blend` computes it, a layer at a time.

How the adapters of one layer are combined is a function registered in `combinations`; here is what is around it: which
adapters a layer has and at which weights, modules that are trained whole, biases, and how near the result came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import hypot, isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .adapter import wide
from .attach import META
from .combinations import Combination, combination_types
from .combinations.registry import Part
from .layer import AdaptedLayer
from .lowrank import LowRank
from .sites import Embedding
from .targets import condense, walk
from .tuners.lora import LoRA, LoraConfig, lora_config
from .weights import Weight, resolve

if TYPE_CHECKING:
    from .adapted import AdaptedModel


@dataclass(frozen=True)
class Report:
    """How near a combined adapter is to what its kind defines: what was lost by cutting to a rank, and by clamping.

    Errors are Frobenius norms of the difference, relative to the norm of the target; 0 where nothing was cut, NaN for
    kinds that work on factors, which have no target. Storing the result in half precision comes on top.
    """

    error: float
    """Relative error of all layers together."""
    errors: dict[str, float]
    """Relative error by layer path."""
    ranks: dict[str, int]
    """Rank by layer path."""


class Blend(NamedTuple):
    """A combined adapter as a file holds it, tensors by name without prefix; attached to nothing."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    report: Report


def find_combination(kind: str) -> Combination:
    """The combination of this name.

    Raises:
        ValueError: there is none.
    """
    if kind not in combination_types():
        raise ValueError(f"combination_type={kind!r} is unknown; known: {sorted(combination_types())}")
    return combination_types()[kind]


@torch.no_grad()
def blend(
    model: AdaptedModel,
    names: Sequence[str],
    weights: Sequence[Weight],
    kind: str = "svd",
    *,
    progressbar: bool = False,
    **options: Any,
) -> Blend:
    """Combine adapters of `model`, which stays as it is. See `AdaptedModel.combine`.

    Layers that only some adapters target combine those. Deltas of the size of a weight exist for one layer at a time.
    """
    combination = find_combination(kind)
    found = Sources(model, names, weights)
    combination.check_options(options)
    reason = combination.reason_against(found.parts, len(names))
    if reason is not None:
        raise ValueError(reason)
    given = {name: value for name, value in options.items() if value is not None}
    given = _with_rank(combination, found.parts, given)
    combined: dict[str, LowRank] = {}
    biases: dict[str, Tensor] = {}
    for path, parts in tqdm(found.parts.items(), kind, disable=not progressbar, unit="layer"):
        combined[path] = _checked(combination, parts, path, given)
        changes = [part.weight * change for part in parts if (change := part.bias_delta()) is not None]
        if changes:
            biases[path] = torch.stack(changes).sum(0)
    return _packed(model, names, found, combined, biases)


def _checked(combination: Combination, parts: list[Part], path: str, options: dict[str, Any]) -> LowRank:
    try:
        low = combination(parts, path, **options)
        finite = isfinite(low.b.sum().item() + low.a.sum().item())
    except torch.linalg.LinAlgError:  # which is how decompositions take such numbers
        finite = False
    if not finite:
        raise ValueError(f"{path}: the combined adapter is NaN or infinite: one of the adapters is broken there")
    return low


class Sources:
    """What is combined: by layer path its adapters at their weights, and the copies of modules trained whole.

    Raises:
        ValueError: unknown adapters, no weight for each, a layer that is adapted by one and trained whole by another,
            or an adapter that trains biases of the base model, which are not its own.
    """

    def __init__(self, model: AdaptedModel, names: Sequence[str], weights: Sequence[Weight]):
        if not names or len(names) != len(weights):
            raise ValueError(f"{len(names)} adapters and {len(weights)} weights: give one weight for each adapter")
        self.places = walk(model.model)
        adapters = {name: model.adapters(name) for name in names}
        for name in names:
            if model.state.biases.get(name):
                raise ValueError(
                    f"adapter {name!r} trains biases of the base model, which are everybody's: it cannot be combined"
                )
        resolved = [(adapters[n], resolve(weight, adapters[n])) for n, weight in zip(names, weights, strict=True)]
        self.parts: dict[str, list[Part]] = {}
        self.copies: dict[str, list[Part]] = {}
        for path, place in self.places.items():
            if not isinstance(place.module, AdaptedLayer):
                continue
            here = [Part(found[path], place.module, at[path]) for found, at in resolved if path in found]
            if any(part.adapter.by_name for part in here):
                raise ValueError(
                    f"{path} has adapters of bare parameters (target_parameters), which cannot be combined"
                )
            whole = [part for part in here if part.adapter.whole is not None]
            if whole and len(whole) < len(here):
                raise ValueError(
                    f"{path} is trained whole (modules_to_save) by some of {list(names)} and adapted by others: they "
                    "cannot be combined"
                )
            if here:
                (self.copies if whole else self.parts)[path] = here

    def averages(self) -> dict[str, Tensor]:
        """The tensors of the modules trained whole, combined, by the names of files.

        Raises:
            ValueError: some have no average.
        """
        return {f"{p}.{key}": t for p, copies in self.copies.items() for key, t in _average(p, copies).items()}


def _with_rank(combination: Combination, layers: Mapping[str, list[Part]], options: dict[str, Any]) -> dict[str, Any]:
    """`options` with a rank to cut to: without one, the largest rank of the adapters."""
    if "svd_rank" not in combination.options or "svd_rank" in options or "max_error" in options:
        return options
    for path, parts in layers.items():
        for part in parts:
            if part.rank is None:
                raise ValueError(
                    f"{path}: {part.method} has no rank to go by: give svd_rank, or max_error for ranks that keep to it"
                )
    return {**options, "svd_rank": max(part.rank or 0 for parts in layers.values() for part in parts)}


def _packed(
    model: AdaptedModel,
    names: Sequence[str],
    found: Sources,
    combined: Mapping[str, LowRank],
    biases: Mapping[str, Tensor],
) -> Blend:
    config = lora_config(model.configs[names[0]], {path: low.b.shape[1] for path, low in combined.items()})
    config.target_modules = condense(combined, found.places)
    config.modules_to_save = list(found.copies) or None
    config.lora_bias = bool(biases)
    tensors: dict[str, Tensor] = {}
    for path, low in combined.items():
        parts = found.parts[path]
        if biases and isinstance(parts[0].layer.site, Embedding):
            raise ValueError(
                f"{path}: the blend changes the bias of {next(iter(biases))}, and a LoRA with biases cannot adapt an "
                "embedding"
            )
        dtype = reduce(torch.promote_types, [part.adapter.dtype for part in parts])
        lora = config.build(parts[0].layer.site, path, META, dtype)
        assert isinstance(lora, LoRA)
        lora.set_factors(low.b, low.a, biases.get(path))
        tensors |= {f"{path}.{key}": held[name] for key, held, name in lora.slots()}
    return Blend(config, tensors | found.averages(), _report(combined))


def _report(combined: Mapping[str, LowRank]) -> Report:
    error, norm = (hypot(*(getattr(low, of) for low in combined.values())) for of in ("error", "norm"))
    errors = {path: _relative(low.error, low.norm) for path, low in combined.items()}
    return Report(_relative(error, norm), errors, {path: low.b.shape[1] for path, low in combined.items()})


def _relative(error: float, norm: float) -> float:
    return error / norm if error else 0.0


def _average(path: str, copies: list[Part]) -> dict[str, Tensor]:
    r"""Tensors of a module that adapters train whole: $M + \sum_i w_i (M_i - M)$ with M the base model's.

    For weights that sum to one this is the weighted average of the copies.
    """
    base = copies[0].layer.base_layer.state_dict()
    trained = [(part.weight, part.adapter.whole.state_dict()) for part in copies if part.adapter.whole is not None]
    combined = {}
    for key, original in base.items():
        if any(key not in copy for _, copy in trained):
            raise ValueError(f"{path} is trained whole, and {key} is not in every copy of it: they cannot be combined")
        if original.is_floating_point():
            moved = [weight * (wide(copy[key]) - wide(original)) for weight, copy in trained]
            combined[key] = (wide(original) + torch.stack(moved).sum(0)).to(trained[0][1][key].dtype)
        elif all(torch.equal(copy[key], trained[0][1][key]) for _, copy in trained):
            combined[key] = trained[0][1][key].clone()
        else:
            raise ValueError(f"{path} is trained whole, and its {key} are whole numbers, which have no average")
    return combined
