"""A language model with the adapters that somebody asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core import PeftModel
from ..core.weighted import Weighted
from .base import load_base


def load_with_adapters(
    model: str, adapters: Sequence[Weighted], revision: str | None = None, **options: Any
) -> tuple[Any, Any]:
    """A model with these adapters on it, all active at their weights, and its tokenizer. Without any, the plain model.

    Raises:
        ConfigError, AdapterFileError: the model or an adapter cannot be loaded.
    """
    base, tokenizer = load_base(model, revision, **options)
    if not adapters:
        return base, tokenizer
    first, *others = adapters
    adapted = PeftModel.from_pretrained(base, first.path, adapter_name=first.name)
    for other in others:
        adapted.load_adapter(other.path, other.name)
    adapted.set_adapter([adapter.name for adapter in adapters])
    for adapter in adapters:
        if adapter.weight != 1:
            adapted.base_model.set_weight(adapter.name, adapter.weight)
    return adapted, tokenizer
