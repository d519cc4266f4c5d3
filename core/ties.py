"""Tied weights: parameters that several modules of a model hold."""

from __future__ import annotations

from collections import Counter

from torch import nn


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
