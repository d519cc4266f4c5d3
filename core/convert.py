"""Any adapter as a LoRA: for programs that read nothing else, and for what only a LoRA can do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .adapted import AdaptedModel
from .adapter import Dense
from .combine import Blend, Report, blend
from .config import PREFIX
from .errors import PeftWarning
from .files import save_adapter
from .handle import handle_of
from .model import PeftModel
from .tuners.lora import LoraConfig


def convert_to_lora(
    model: nn.Module,
    rank: int | float | None = None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors, by the names of PEFT's files, of the LoRA nearest to an adapter; `model` stays as it is.

    For every method that is a change of weights, at every kind of layer. The scale is 1. A change of biases becomes a
    bias of the LoRA; modules trained whole come along.

    Arguments:
        rank: an int is the rank, at which each layer is the best approximation there is. A float in (0, 1] is the share
            of the squared singular values to keep, by which each layer finds the smallest rank of its own: the relative
            error is at most sqrt(1 - rank). `save_as_lora` says which it is. None keeps the ranks that the adapter has,
            and is exact: so a PiSSA or OLoRA becomes a plain LoRA over the original base, of twice its rank.
        compile_kwargs: PEFT's way to tune how it computes; nothing is compiled here.

    Raises:
        TypeError: no adapters, or one that is no change of weights.
        ValueError: an unknown adapter, an impossible rank, or an adapter that trains biases of the base model.
    """
    config, tensors, _ = _converted(model, rank, adapter_name, progressbar)
    prefix = PREFIX if isinstance(model, PeftModel) else ""
    return config, {prefix + key: tensor for key, tensor in tensors.items()}


def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: int | float | None = None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> Report:
    """Write what `convert_to_lora` finds as an adapter directory that `peft` reads, its relative error in the header.

    Returns:
        Ranks and relative errors, by layer and in all.

    Raises:
        TypeError, ValueError: as `convert_to_lora`; nothing is written then.
    """
    config, tensors, report = _converted(model, rank, adapter_name, progressbar)
    save_adapter(path, config, tensors, {"relative_error": f"{report.error:.3g}"})
    return report


def _converted(model: nn.Module, rank: int | float | None, name: str, progressbar: bool) -> Blend:
    handle = _handle(model)
    named = next((path for path, adapter in handle.adapters(name).items() if adapter.by_name), None)
    if named is not None:
        raise ValueError(f"{named} has adapters of bare parameters (target_parameters): they are no LoRA of a layer")
    if rank is None:
        _check_exact(handle, name)
        return blend(handle, [name], [1.0], "cat", progressbar=progressbar)
    options = _cut(rank)
    config = handle.configs.get(name)
    if isinstance(config, LoraConfig) and not config.use_dora and not config.needs_base:
        message = f"{name!r} is a LoRA already: converting it only changes its rank"
        warnings.warn(message, PeftWarning, stacklevel=3)
    for path, adapter in handle.adapters(name).items():
        if adapter.whole is None:
            adapter.check_mergeable()
            most = min(adapter.site.out, adapter.site.cols)
            if rank > most:
                raise ValueError(f"The chosen rank {rank} is larger than the weight of {path} allows, which is {most}")
    return blend(handle, [name], [1.0], "svd", progressbar=progressbar, **options)


def _check_exact(handle: AdaptedModel, name: str) -> None:
    """Raise `ValueError` if the adapter has no ranks to keep, or is no change of the original weights."""
    for path, adapter in handle.adapters(name).items():
        if adapter.whole is None:
            adapter.check_mergeable()
            if not isinstance(adapter, Dense) or adapter.factors() is None:
                raise ValueError(f"{path}: {type(adapter).__name__} has no rank of its own: give one")
            if adapter.replaces_base:
                raise ValueError(f"{path}: the adapter runs over a quantised weight, which no LoRA brings about")


def _handle(model: nn.Module) -> AdaptedModel:
    try:
        return handle_of(model)
    except ValueError as error:
        raise TypeError(f"{error}, so there is nothing to convert") from error


def _cut(rank: int | float) -> dict[str, Any]:
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise ValueError(f"rank={rank}: a float is the share of squared singular values to keep, in (0, 1]")
        return {"max_error": (1 - rank) ** 0.5}
    if rank < 1:
        raise ValueError(f"rank={rank} is no rank: give 1 or more, or a float for a share of squared singular values")
    return {"svd_rank": rank}
