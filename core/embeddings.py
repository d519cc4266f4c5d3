"""A language model's embeddings in the file of an adapter, whose vocabulary may not be that of the base model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn

from .adapted import AdaptedModel
from .config import PeftConfig, PeftType
from .dispatch import fetch, offloading
from .errors import PeftWarning
from .layer import AdaptedLayer
from .tuners.tokens import Tokens

SaveEmbeddings = bool | Literal["auto"]
_TARGETED = ("embed_tokens", "lm_head")
"""Names of embeddings that PEFT saves along when an adapter targets them."""


def embeddings(
    handle: AdaptedModel, name: str, choice: SaveEmbeddings, state_dict: dict[str, Tensor] | None, prefix: str
) -> dict[str, Tensor]:
    """Base embeddings to save along with an adapter, under the names of its file, without PEFT's prefix.

    Arguments:
        choice: "auto" takes those that the adapter targets, and input and output embeddings both if the vocabulary is
            not that of the base model's own config; True takes both, False none. One that is trained whole is in the
            file already.
        state_dict: the values, under `prefix` and their path, if not those of the model.

    Raises:
        ValueError: True, and the model tells no embeddings; an unknown choice.
    """
    if choice not in (True, False, "auto"):
        raise ValueError(f"save_embedding_layers={choice!r} is unknown; expected 'auto', True or False")
    if choice is False:
        return {}
    config, ends = handle.configs[name], list(_ends(handle.model))
    if choice is True and not ends:
        kind = type(handle.model).__name__
        raise ValueError(f"save_embedding_layers=True: {kind} has no get_input_embeddings() that tells which they are")
    every = choice is True or (bool(ends) and _resized(handle.model, config))
    tokens = config.peft_type == PeftType.TRAINABLE_TOKENS or getattr(config, "trainable_token_indices", None)
    found: dict[str, Tensor] = {}
    for path, module in handle.model.named_modules():
        if not any(module is end for end in ends):
            continue
        adapter = module.adapters[name] if isinstance(module, AdaptedLayer) and name in module.adapters else None
        targeted = adapter is not None and path.rpartition(".")[2] in _TARGETED and not tokens
        if (adapter is None or adapter.whole is None) and (every or targeted):
            base = module.base_layer if isinstance(module, AdaptedLayer) else module
            here = f"{prefix}{path}.base_layer" if base is not module else f"{prefix}{path}"
            wrapper = adapter.prefix if isinstance(adapter, Tokens) else ""
            for key, value in _values(base).items():
                filed = f"{path}.{key}" if adapter is None else f"{path}.{wrapper}base_layer.{key}"
                found[filed] = value if state_dict is None else state_dict[f"{here}.{key}"]
    return found


def _ends(model: nn.Module) -> Iterator[nn.Module]:
    """Input and output embeddings, as a transformers model tells them."""
    for end in ("input", "output"):
        get = getattr(model, f"get_{end}_embeddings", None)
        try:
            module = None if get is None else get()
        except NotImplementedError:  # a model without
            continue
        if isinstance(module, nn.Module):
            yield module


def _values(module: nn.Module) -> dict[str, Tensor]:
    hook = offloading(module)
    held = module._parameters if hook is None else fetch(module, hook)
    return {key: value.detach() for key, value in held.items() if value is not None}


def _resized(model: nn.Module, config: PeftConfig) -> bool:
    """Whether the vocabulary is not that of the base model's config, in its directory or the hub's local cache."""
    own: Any = getattr(model, "config", None)
    size, source = getattr(own, "vocab_size", None), config.base_model_name_or_path
    if not size or not source:
        return False
    try:
        original = type(own).from_pretrained(source, revision=config.revision or "main", local_files_only=True)
    except OSError:
        warnings.warn(
            f"Could not find a config file in {source} - will assume that the vocabulary was not modified. "
            "Say save_embedding_layers=True if it was, or False.",
            PeftWarning,
            stacklevel=4,
        )
        return False
    return size != original.vocab_size
