"""Tied weights: parameters that several modules of a model hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def note_untied(model: nn.Module) -> None:
    """Have a transformers model whose tied weights a merge has parted not tie them again when it is loaded."""
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
        weights = {id(getattr(end, "weight", None)) for end in ends if end is not None}
        config.tie_word_embeddings = len(weights) < 2  # type: ignore[union-attr]


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that several modules hold (tied weights)."""
    counts = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return {key for key, count in counts.items() if count > 1}


def tied_to(weight: Tensor, modules: Iterable[tuple[str, nn.Module]]) -> Iterator[str]:
    """The paths of the modules whose weight this is."""
    return (path for path, module in modules if module._parameters.get("weight") is weight)


@contextmanager
def kept_tied(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Around a change of weights: modules that had one weight, and have equal ones afterwards, have one again."""
    groups: dict[int, list[nn.Module]] = {}
    for module in modules:
        groups.setdefault(id(module._parameters.get("weight")), []).append(module)
    yield
    for first, *others in groups.values():
        weight = first._parameters.get("weight")
        for other in others:
            found = other._parameters.get("weight")
            if weight is not None and found is not None and found is not weight and torch.equal(found, weight):
                other._parameters["weight"] = weight
