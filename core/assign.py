"""Putting the tensors of a file into an attached adapter: all of them, or none."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapter import Adapter, common_slots
from .targets import near
from .train import TrainedBias


class LoadResult(NamedTuple):
    """What a set of tensors and an adapter had not in common; keys are those of the file."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass
class _Target:
    """Where one tensor of a file goes: an adapter's slot, or a parameter that is there already."""

    name: str
    old: Tensor
    adapter: Adapter | None = None
    held: dict[str, Any] | None = None
    key: str = ""
    of_base: bool = False

    def take(self, new: Tensor) -> None:
        if self.adapter is None or self.held is None or not self.old.is_meta:
            self.old.copy_(new)
            return
        # a copy, since the file may change under a mapped tensor
        new = new.to(self.adapter.site.device, self.old.dtype, copy=True)
        self.held[self.key] = nn.Parameter(new, requires_grad=False) if isinstance(self.old, nn.Parameter) else new


def assign(
    name: str,
    tensors: dict[str, Tensor],
    adapters: dict[str, Adapter],
    biases: dict[str, TrainedBias],
    model: nn.Module,
    *,
    strict: bool,
    missing_ok: bool,
) -> LoadResult:
    """Overwrite the tensors of adapter `name`, by path, and the biases trained along.

    Keys that name parameters of the base model overwrite those: PEFT stores resized embeddings so.

    Raises:
        ValueError: tensors of a wrong shape; with `strict`, unexpected ones, and missing ones unless `missing_ok`.
            Nothing has changed then.
    """
    for adapter in adapters.values():
        adapter.settle(set(tensors))
    targets = [
        _Target(adapter.file_key(path, file_key), held[key], adapter, held, key)
        for path, adapter in adapters.items()
        for file_key, held, key in adapter.slots()
    ]
    targets += [_Target(file_key, held[key]) for file_key, held, key in common_slots(adapters.values())]
    absent = [t for t in targets if t.name not in tensors]
    targets += [_Target(key, bias.parameter) for key, bias in biases.items()]
    names = {t.name for t in targets}
    # PEFT stores an embedding that is trained whole twice, if embeddings are saved along
    tensors = {k: t for k, t in tensors.items() if k in names or k.replace(".modules_to_save.", ".") not in names}
    unexpected = tensors.keys() - names
    if unexpected:
        base = dict(model.named_parameters(remove_duplicate=False))  # tied weights under all of their names
        places = {key: place for key in unexpected if (place := _place_of(key, base)) is not None}
        targets += [_Target(key, base[place], of_base=True) for key, place in places.items()]
        unexpected -= places.keys()
    given = [t for t in targets if t.name in tensors]
    tensors = tensors | {t.name: t.adapter.fit(t.key, tensors[t.name]) for t in given if t.adapter is not None}
    elsewhere = [t.name for t in given if t.of_base and t.old.is_meta]
    if elsewhere:
        raise ValueError(
            f"adapter {name!r} brings weights of the base model, which are offloaded here: {_listed(elsewhere)}; keep "
            "these layers on a device"
        )
    wrong = [
        f"{t.name} has shape {tuple(tensors[t.name].shape)}, expected {tuple(t.old.shape)}"
        + (" as in the base model: call resize_token_embeddings first if it is an embedding" if t.of_base else "")
        for t in given
        if tensors[t.name].shape != t.old.shape
    ]
    if wrong:
        raise ValueError(f"adapter {name!r}: {'; '.join(wrong[:5])}")
    result = LoadResult([t.name for t in absent], [key for key in tensors if key in unexpected])
    if strict and (unexpected or (absent and not missing_ok)):
        raise ValueError(f"adapter {name!r}: {_mismatch(result, adapters)}")
    for adapter in {id(t.adapter): t.adapter for t in absent if t.adapter is not None}.values():
        _initialise(adapter)
    with torch.no_grad():
        for target in given:
            target.take(tensors[target.name])
    return result


def _place_of(key: str, base: Container[str]) -> str | None:
    """The name among parameters of the base model of one that a file stores, whatever wrapped it there or does here."""
    path, _, last = key.rpartition(".")
    for wrapper in (".original_module", ".token_adapter.base_layer", ".base_layer"):
        path = path.removesuffix(wrapper)
    return next((k for k in (key, f"{path}.{last}", f"{path}.base_layer.{last}") if k in base), None)


@torch.no_grad()
def _initialise(adapter: Adapter) -> None:
    """Start an adapter of which some tensors are missing as a fresh one starts."""
    if any(p.is_meta for p in adapter.parameters()):
        adapter.to_empty(device=adapter.site.device)
    adapter.reset()


def _mismatch(result: LoadResult, paths: Iterable[str]) -> str:
    parts = []
    if result.missing_keys:
        parts.append(f"missing {_listed(result.missing_keys)}")
    if result.unexpected_keys:
        modules = [key.rsplit(".lora", 1)[0].rpartition(".")[0] for key in result.unexpected_keys[:3]]
        parts.append(f"no place for {_listed(result.unexpected_keys)}{near(modules, paths)}")
    return "; ".join(parts)


def _listed(items: list[str], shown: int = 3) -> str:
    return f"{items[:shown]}" + (f" and {len(items) - shown} more" if len(items) > shown else "")
