"""What virtual tokens change in the arguments of a backbone's call: masks, positions and caches."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MARK = "_virtual_tokens"
"""Attribute of a transformers cache that says which virtual tokens lie in it."""


@dataclass
class Virtual:
    """The virtual tokens before the rows of a batch.

    Rows with fewer than others have masked places at their start, so that the last token always lies next to the text.
    """

    count: int
    """Places before every row."""
    lengths: Tensor | None = None
    """(batch,): how many of them are tokens, where rows differ."""

    def __bool__(self) -> bool:
        return self.count > 0

    def mask(self, like: Tensor) -> Tensor:
        """(batch, count): 1 for tokens, 0 for places left empty."""
        if self.lengths is None:
            return like.new_ones(len(like), self.count)
        places = torch.arange(self.count, device=like.device)
        return (places >= self.count - self.lengths.to(like.device)[:, None]).to(like.dtype)

    def positions(self, like: Tensor) -> Tensor:
        """Positions of the places, shaped as `like` (..., batch, tokens) but for the last axis."""
        places = torch.arange(self.count, device=like.device, dtype=like.dtype)
        if self.lengths is not None:
            places = (places - (self.count - self.lengths.to(places)[:, None])).clamp(min=0)
        return places.expand(*like.shape[:-1], self.count)

    def shift(self, positions: Tensor) -> Tensor:
        """Positions of the text, which comes after."""
        return positions + (self.count if self.lengths is None else self.lengths.to(positions)[:, None])


class Signature:
    """How a backbone is called."""

    def __init__(self, backbone: nn.Module):
        names = list(inspect.signature(backbone.forward).parameters)
        self.names = names
        self.cache = "cache" if "cache" in names else "past_key_values"
        self.positions = "position_ids" in names
        self.counts_from_zero = self.positions and any(hasattr(backbone, n) for n in ("rotary_emb", "wpe"))
        """Whether the text's first token is at position 0, wherever padding puts it: then positions come from the
        mask, as `generate` computes them."""
        self.fixed_places = any(hasattr(backbone, n) for n in ("embed_positions", "position_embedding")) or hasattr(
            getattr(backbone, "embeddings", None), "create_position_ids_from_input_ids"
        )
        """Whether a token's position is its place in the tensor, which a caller cannot change."""

    def takes_positions(self, virtual: Virtual) -> bool:
        """Whether positions are to be computed for a call that gives none."""
        return self.counts_from_zero or (self.positions and virtual.lengths is not None)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return dict(zip(self.names, args, strict=False)) | kwargs


def is_first(cache: Any) -> bool:
    """Whether this call starts a text, so that virtual tokens must come before it.

    Raises:
        ValueError: the cache holds a text that was begun without them.
    """
    if cache is None:
        return True
    marked = getattr(cache, MARK, None)
    if marked and torch.compiler.is_compiling():  # a static cache knows its length only on its device
        return False
    length = int(cache.get_seq_length())
    if length and marked is None:
        raise ValueError(
            f"this cache holds {length} tokens that came without the prompt: start with an empty cache, or disable the "
            "adapter to continue without it"
        )
    return length == 0


def widen_cache(cache: Any, count: int) -> None:
    """Room for virtual tokens in a static cache that was sized for the text alone."""
    caches = [getattr(cache, "self_attention_cache", cache)]
    for layer in [layer for c in caches for layer in getattr(c, "layers", ())]:
        size = getattr(layer, "max_cache_len", None)
        if size is not None and not layer.is_initialized:
            window = getattr(layer, "sliding_window", None) if layer.is_sliding else None
            layer.max_cache_len = size + count if window is None else min(size + count, max(size, window))


def widen_mask(mask: Any, virtual: Virtual, cache: Any, queries: int, first: bool) -> Tensor | None:
    """An attention mask (batch, tokens) with the virtual tokens in it; what `generate` makes of it for a static cache,
    (batch, 1, queries, places), is understood too.

    Raises:
        ValueError: a mask of another kind.
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return torch.cat([virtual.mask(mask), mask], dim=1)
    if not isinstance(mask, Tensor) or mask.ndim != 4 or not getattr(cache, "is_compileable", False):
        what = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}"
        raise ValueError(
            f"an attention mask {what} cannot be widened for virtual tokens: pass one of shape (batch, tokens); with a "
            "static cache, a model whose attention slides needs cache_implementation='dynamic'"
        )
    allowed = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0  # the last query sees all text
    if first or queries > 1:
        length = queries if first else int(cache.get_seq_length()) - virtual.count + queries
        text = allowed[:, :length].long()
        return torch.cat([virtual.mask(text), text], dim=1)
    shifted = torch.cat([virtual.mask(allowed), allowed[:, : -virtual.count]], dim=1)
    shifted = shifted & (torch.arange(shifted.shape[1], device=mask.device) <= cache.get_seq_length())
    if mask.dtype == torch.bool:
        return shifted[:, None, None]
    return torch.zeros_like(mask).masked_fill(~shifted[:, None, None], torch.finfo(mask.dtype).min)


def enter(
    call: dict[str, Any], signature: Signature, virtual: Virtual, *, in_input: int, first: bool, queries: int
) -> None:
    """Change the arguments of a call for virtual tokens, of which `in_input` are put before the input now.

    queries: tokens of the text in this call.
    """
    cache = call.get(signature.cache)
    mask = call.get("attention_mask")
    sample = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
    if mask is None and virtual.lengths is not None:
        text = queries if first or cache is None else int(cache.get_seq_length()) - virtual.count + queries
        mask = torch.ones(len(sample), text, dtype=torch.long, device=sample.device)
    mask = widen_mask(mask, virtual, cache, queries, first)
    if mask is not None:
        call["attention_mask"] = mask
    if (types := call.get("token_type_ids")) is not None and in_input:
        call["token_type_ids"] = torch.cat([types.new_zeros(len(types), in_input), types], dim=1)
    positions = call.get("position_ids")
    if positions is not None:
        entering = virtual.positions(positions)[..., virtual.count - in_input :]
        call["position_ids"] = torch.cat([entering, virtual.shift(positions)], dim=-1)
    elif mask is not None and mask.ndim == 2 and signature.takes_positions(virtual):
        call["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -(in_input + queries) :]
    call.pop("cache_position", None)  # old transformers': without the virtual tokens; models compute it themselves


def row_lengths(numbers: Tensor, counts: list[int]) -> Virtual:
    """Virtual tokens of rows that run the prompts `numbers`, which have `counts` tokens."""
    most = max(counts, default=0)
    if all(count == most for count in counts):
        return Virtual(most)
    return Virtual(most, torch.tensor(counts)[numbers.cpu()])
