"""The layer before the first one: it holds a model's prompts and puts them before the text, by hooks on its backbone.

Two hooks do it. One puts virtual tokens before a call's input, with mask and positions to match; the other takes their
places off its output. Heads, labels and losses around the backbone see the text and nothing else, so that no model
class needs a forward of its own. Of an encoder-decoder model the encoder is the backbone: its output keeps the virtual
tokens, for the decoder to attend to, and a third hook widens the decoder's mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layer import AdaptedLayer
from ..state import State
from ..targets import Place
from .entry import MARK, Signature, Virtual, enter, is_first, row_lengths, widen_cache
from .prompt import Prefix, Prompt, SoftPrompt
from .site import PromptSite

if TYPE_CHECKING:
    from .config import PromptLearningConfig

NAME = "virtual_tokens"
"""Where a model holds its prompts."""


class PromptLayer(AdaptedLayer):
    """Holds the prompts of `model`. Without any that run, it changes nothing."""

    site: PromptSite

    def __init__(self, model: nn.Module, state: State):
        self.__dict__["site"] = PromptSite(model)
        super().__init__(nn.Identity(), state, NAME)
        self.__dict__.update(
            training=model.training, _hooks=[], _skip=0, _decoder_skip=0, _own_cache=False, task_ids=None
        )

    def _describe_base(self) -> None:
        self.__dict__["_stacks"] = {}

    # ---------------------------------------------------------------- coming and going

    def attach(self) -> None:
        """Put the hooks on the backbone."""
        site = self.site
        hooks = self.__dict__["_hooks"]
        hooks.append(site.backbone.register_forward_pre_hook(self._enter, with_kwargs=True))
        if site.decoder is None:
            hooks.append(site.backbone.register_forward_hook(self._leave, with_kwargs=True))
        else:
            hooks.append(site.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
            hooks.append(site.decoder.register_forward_hook(self._leave_decoder, with_kwargs=True))

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in self.__dict__["_hooks"]:
            hook.remove()
        self.__dict__["_hooks"] = []

    def __getitem__(self, name: str) -> Prompt:
        found = self.adapters[name]
        assert isinstance(found, Prompt)
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("the layer of prompts is not called: they enter at the backbone")

    # ---------------------------------------------------------------- which prompts

    def _running(self, kind: type[Prompt]) -> list[Any]:
        found = (self.adapters[n] for n in self.state.running if n in self.adapters)
        return [a for a in found if isinstance(a, kind)]

    def _choices(self, batch: Tensor) -> tuple[list[list[str]], Tensor | None]:
        """The prompts of every kind of row, and which kind each row is (None: there is but one)."""
        rows = self.state.rows
        if rows is None or not self.state.running:
            return [[n for n in self.state.running if n in self.adapters]], None
        names = rows.layout(batch, NAME).names
        kinds = list(dict.fromkeys(names))
        return [[n] if n in self.adapters else [] for n in kinds], torch.tensor([kinds.index(n) for n in names])

    def _gather(self, batch: Tensor, kind: type[Prompt], decoder: bool) -> tuple[Tensor | None, Virtual]:
        """What enters before the rows: (batch, n, width), or for prefixes (layers, 2, batch, heads, n, d)."""
        choices, numbers = self._choices(batch)
        axis = -2
        parts: list[Tensor | None] = []
        for names in choices:
            found = [self._of(self[n], kind, decoder, batch) for n in names]
            here = [t for t in found if t is not None]
            parts.append(torch.cat(here, dim=axis) if len(here) > 1 else here[0] if here else None)
        counts = [0 if p is None else p.shape[axis] for p in parts]
        virtual = Virtual(counts[0]) if numbers is None else row_lengths(numbers, counts)
        if not virtual:
            return None, virtual
        if numbers is None:
            return parts[0], virtual
        rows_axis = 0 if kind is SoftPrompt else 2
        whole: Tensor | None = None
        for i, part in enumerate(parts):
            if part is None:
                continue
            padded = nn.functional.pad(part, (0, 0, virtual.count - counts[i], 0))
            mine = (numbers == i).to(part.device)
            shape = [1] * part.ndim
            shape[rows_axis] = len(mine)
            chosen = torch.where(mine.view(shape), padded, torch.zeros((), dtype=part.dtype, device=part.device))
            whole = chosen if whole is None else whole + chosen
        return whole, virtual

    def _of(self, prompt: Prompt, kind: type[Prompt], decoder: bool, batch: Tensor) -> Tensor | None:
        """One prompt's part, for all rows."""
        if not isinstance(prompt, kind):
            return None
        task_ids = self.__dict__["task_ids"]
        if task_ids is not None:
            task_ids = task_ids.to(batch.device)
            if len(task_ids) not in (1, len(batch)):
                task_ids = task_ids.repeat_interleave(len(batch) // len(task_ids))  # beams
        if isinstance(prompt, Prefix):
            pairs = prompt.keys_and_values(task_ids)[:, :, None]
            return pairs.expand(-1, -1, len(batch), -1, -1, -1)
        assert isinstance(prompt, SoftPrompt)
        tokens = prompt.entering(decoder, task_ids)
        return tokens if tokens is None else tokens.expand(len(batch), -1, -1)

    @contextmanager
    def tasks(self, task_ids: Tensor | None) -> Iterator[None]:
        """Run multitask prompts as for these tasks, one for each row."""
        before = self.__dict__["task_ids"]
        self.__dict__["task_ids"] = task_ids
        try:
            yield
        finally:
            self.__dict__["task_ids"] = before

    # ---------------------------------------------------------------- entering and leaving

    def _enter(self, backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.site.signature.bind(args, kwargs)
        alone = self.site.decoder is None
        self.__dict__["_skip"] = self._prepend(backbone, call, self.site.signature, decoder=False, prefixes=alone)
        return (), call

    def _enter_decoder(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        signature = self.site.decoder_signature
        assert signature is not None
        call = signature.bind(args, kwargs)
        self._widen_cross_attention(call)
        self.__dict__["_decoder_skip"] = self._prepend(decoder, call, signature, decoder=True, prefixes=True)
        return (), call

    def _prepend(self, backbone: Any, call: dict[str, Any], signature: Signature, decoder: bool, prefixes: bool) -> int:
        """Let the running prompts enter a call; how many places were added to its input."""
        embeds = call.get("inputs_embeds")
        sample = call.get("input_ids") if embeds is None else embeds
        if sample is None:
            return 0
        cache = call.get(signature.cache)
        marked: Virtual | None = getattr(cache, MARK, None)
        if not marked and not any(p.enters(decoder, prefixes) for p in self._running(Prompt)):
            return 0
        if not is_first(cache):
            if marked:
                enter(call, signature, marked, in_input=0, first=False, queries=sample.shape[1])
            return 0
        tokens, virtual = self._gather(sample, SoftPrompt, decoder)
        pairs, before = self._gather(sample, Prefix, decoder) if prefixes else (None, Virtual(0))
        if not virtual and not before:
            return 0
        self._check_rows(signature, virtual, before)
        if before:
            cache = self._seed(backbone, call, signature, pairs, before)
        elif cache is not None:
            widen_cache(cache, virtual.count)
        whole = _joined(before, virtual)
        queries = sample.shape[1]
        enter(call, signature, whole, in_input=virtual.count, first=True, queries=queries)
        if tokens is not None:
            if embeds is None:
                embeds = backbone.get_input_embeddings()(call["input_ids"])
            call["inputs_embeds"] = torch.cat([tokens.to(embeds), embeds], dim=1)
            call.pop("input_ids", None)
        if cache is not None:
            setattr(cache, MARK, whole)
        self.__dict__["_entered"] = whole
        return virtual.count

    def _check_rows(self, signature: Signature, *virtual: Virtual) -> None:
        if signature.fixed_places and any(v.lengths is not None for v in virtual):
            raise ValueError(
                f"{type(self.site.backbone).__name__} numbers its places itself, so that rows with different numbers "
                "of virtual tokens cannot share a batch: give all of them as many, or run a batch for each adapter"
            )

    def _seed(
        self, backbone: Any, call: dict[str, Any], signature: Signature, pairs: Tensor | None, before: Virtual
    ) -> Any:
        """Put keys and values into the call's cache, or a new one."""
        if backbone.training and getattr(backbone, "gradient_checkpointing", False):
            raise ValueError(
                "prefix tuning keeps its tokens in the cache, which gradient checkpointing has none of: call "
                "gradient_checkpointing_disable(), or use prompt tuning or p-tuning"
            )
        from transformers import DynamicCache, EncoderDecoderCache

        cache = call.get(signature.cache)
        wanted = call.get("use_cache")
        self.__dict__["_own_cache"] = cache is None and not (self.site.config.use_cache if wanted is None else wanted)
        if cache is None:
            cache = DynamicCache(config=self.site.config)
            if self.site.decoder is not None:
                cache = EncoderDecoderCache(cache, DynamicCache(config=self.site.config))
            call[signature.cache] = cache
        widen_cache(cache, before.count)
        assert pairs is not None
        dtype = next(p.dtype for p in backbone.parameters() if p.is_floating_point())
        for i, (keys, values) in enumerate(pairs.to(dtype)):
            getattr(cache, "self_attention_cache", cache).update(keys.contiguous(), values.contiguous(), i)
        return cache

    def _widen_cross_attention(self, call: dict[str, Any]) -> None:
        """Let the decoder attend to the virtual tokens in the encoder's output."""
        states, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        if states is None or not self._running(SoftPrompt):
            return
        _, virtual = self._gather(states, SoftPrompt, False)
        if mask is None and virtual.lengths is not None:
            mask = torch.ones(len(states), states.shape[1] - virtual.count, dtype=torch.long, device=states.device)
        if mask is not None and mask.ndim == 2 and states.shape[1] == mask.shape[1] + virtual.count:
            call["encoder_attention_mask"] = torch.cat([virtual.mask(mask), mask], dim=1)

    def _leave(self, backbone: Any, args: Any, kwargs: Any, output: Any) -> Any:
        count = self.__dict__["_skip"]
        return _strip(self._mark(output, count, self.site.signature), count, count > 0 and self._pools_first())

    def _leave_decoder(self, decoder: Any, args: Any, kwargs: Any, output: Any) -> Any:
        count = self.__dict__["_decoder_skip"]
        assert self.site.decoder_signature is not None
        return _strip(self._mark(output, count, self.site.decoder_signature), count, False)

    def _mark(self, output: Any, count: int, signature: Signature) -> Any:
        """Say of a cache that the backbone made in this call what lies in it; take back one that only we needed."""
        if not isinstance(output, dict):
            return output
        if self.__dict__["_own_cache"] and signature.cache in output:
            output[signature.cache] = None  # the caller wants none, and would hand it back
            self.__dict__["_own_cache"] = False
        cache = output.get(signature.cache) if count else None
        if cache is not None and getattr(cache, MARK, None) is None:
            setattr(cache, MARK, self.__dict__["_entered"])
        return output

    def _pools_first(self) -> bool:
        """Whether a head around an encoder classifies by its first place, which is then the first virtual token as in
        PEFT."""
        if self.site.causal:
            return False
        configs: Sequence[PromptLearningConfig] = [p.config for p in self._running(SoftPrompt)]
        return any(c.for_classification for c in configs)


def prompt_layer(model: nn.Module, places: Mapping[str, Place], state: State) -> tuple[Place, PromptLayer]:
    """The layer that holds a model's prompts, which may be new, and its place.

    Raises:
        ValueError: as `PromptSite`.
    """
    place = places.get(NAME)
    if place is not None and isinstance(place.module, PromptLayer):
        return place, place.module
    return Place(NAME, nn.Identity(), [(model, NAME)]), PromptLayer(model, state)


def _joined(before: Virtual, virtual: Virtual) -> Virtual:
    """A prefix in the cache and tokens in the input, as one."""
    if not before or not virtual:
        return before or virtual
    if before.lengths is not None or virtual.lengths is not None:
        raise ValueError("a mixed batch cannot have both prefixes and prompts with different numbers of tokens")
    return Virtual(before.count + virtual.count)


def _strip(output: Any, count: int, first_place: bool) -> Any:
    """Take the first `count` places off a backbone's hidden states; attention maps lose those queries and keep those
    keys."""
    if not count:
        return output

    def off(states: Tensor) -> Tensor:
        rest = states[:, count:]
        return torch.cat([states[:, :1], rest[:, 1:]], dim=1) if first_place else rest

    if isinstance(output, tuple):
        return (off(output[0]), *output[1:])
    output["last_hidden_state"] = off(output["last_hidden_state"])
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(off(h) for h in output["hidden_states"])
    if output.get("attentions") is not None:
        output["attentions"] = tuple(a[:, :, count:] for a in output["attentions"])
    return output
