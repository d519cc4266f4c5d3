r"""Activated LoRA (Greenewald et al. 2025, arXiv:2504.12397): a LoRA that is on from an invocation sequence on.

Tokens before the last occurrence of `alora_invocation_tokens` in a row are computed by the base model alone, so their
keys and values can be shared with it; a row without it runs the base model throughout. So no weight is equal to it.

Where each row begins is found when the model is called, from its `input_ids`. What is decoded later belongs to a
cache, and so does the beginning: `generate`, beams and loops of one's own need to say nothing.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Inner, cast
from ..errors import NotMergeableError
from .lora import LoRA

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..state import State

NEVER = 2**62
"""Where a row without the sequence begins."""


def last_occurrence(ids: Tensor, sequence: list[int]) -> Tensor:
    """(rows,) where `sequence` begins for the last time in each row of ids (rows, tokens), or `NEVER`."""
    places = ids.shape[1] - len(sequence) + 1
    if places < 1:
        return ids.new_full((len(ids),), NEVER, dtype=torch.long)
    wanted = torch.tensor(sequence, device=ids.device)
    hits = (ids.unfold(1, len(sequence), 1) == wanted).all(-1)  # (rows, places)
    last = places - 1 - hits.flip(1).int().argmax(1)
    return torch.where(hits.any(1), last, NEVER)


def _cache_of(found: Any) -> Any:
    """The cache among a model's arguments or outputs, by either of its names in transformers."""
    if not hasattr(found, "get"):
        return None
    caches = (found.get("cache"), found.get("past_key_values"))
    return next((cache for cache in caches if hasattr(cache, "get_seq_length")), None)


class Invocation(nn.Module):
    """Where the adapters of one name are on, in the call of the model that runs now."""

    def __init__(self, sequence: list[int]):
        super().__init__()
        self.sequence = sequence
        self.starts: Tensor | None = None  # (rows,) as places in the tokens of this call
        self.tokens = 0
        self.cached: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
        self.handles: list[Any] = []
        self.name, self.past = "", 0
        self.state: Any = None
        """The model's `State`."""

    def listen(self, model: nn.Module, state: State, name: str) -> None:
        """Look at the tokens of every call of `model`."""
        self.name, self.state = name, state
        self.handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True),
        ]

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            self.starts = None
            return
        cache = _cache_of(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        found = last_occurrence(ids, self.sequence)
        if past and cache in self.cached:
            earlier = self.cached[cache].to(ids.device)
            earlier = earlier.repeat_interleave(len(ids) // len(earlier)) - past
            found = torch.where(found == NEVER, earlier, found)
        self.starts, self.tokens, self.past = found, ids.shape[1], past

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = _cache_of(kwargs)
        cache = _cache_of(output) if given is None else given
        if self.starts is not None and cache is not None:
            self.cached[cache] = self.starts + self.past

    def mask(self, y: Tensor) -> Tensor:
        """(rows, tokens, 1) where the adapter is on in a layer's output y (rows, tokens, features).

        Raises:
            ValueError: the model was not told the tokens, or y does not have them.
        """
        if self.starts is None:
            raise ValueError(
                f"adapter {self.name!r} begins at its alora_invocation_tokens, and the model was called without "
                "input_ids (rows, tokens): call it with them, or activate another adapter"
            )
        starts, rows = self.starts, self.state.rows
        if rows is not None:
            names = rows.layout(starts, "").names
            own = [i for i, name in enumerate(names) if name == self.name]
            starts = starts[own]
        if y.ndim != 3 or len(y) != len(starts) or y.shape[1] > self.tokens:
            raise ValueError(
                f"adapter {self.name!r} cannot tell where its alora_invocation_tokens are in a layer with output "
                f"{tuple(y.shape)}: the model was called with {len(starts)} rows of {self.tokens} tokens. Leave this "
                "layer out of target_modules"
            )
        places = torch.arange(self.tokens - y.shape[1], self.tokens, device=y.device)
        return (places >= starts.to(y.device)[:, None])[..., None]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"cached": WeakKeyDictionary(), "starts": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Invocation:
        """The copy listens to the copied model, whose hooks are copied with it."""
        twin = memo[id(self)] = Invocation(list(self.sequence))
        twin.name = self.name
        twin.state = copy.deepcopy(self.state, memo)
        twin.handles = copy.deepcopy(self.handles, memo)
        return twin


class ALoRA(LoRA):
    """A LoRA whose branch is masked by an `Invocation`, its `common`."""

    common: Invocation

    @classmethod
    def shared(cls, adapters: Mapping[str, ALoRA]) -> Invocation:  # type: ignore[override]
        return Invocation(next(iter(adapters.values())).config.alora_invocation_tokens)

    def listen(self, model: nn.Module, state: State, name: str) -> None:
        self.common.listen(model, state, name)

    def release(self) -> None:
        self.common.stop()

    def forward(self, x: Tensor, inner: Inner) -> Tensor:
        y = inner(x)
        b, a = self.factors()
        a, b, x = a.to(y.dtype), b.to(y.dtype), cast(x, y.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        h = self.site.reduce(x, a) * self.common.mask(y)
        return self.site.accumulate(y, h, b, self.gain)

    def check_mergeable(self) -> None:
        raise NotMergeableError("an aLoRA is on for some tokens only, so no weight is equal to it")
