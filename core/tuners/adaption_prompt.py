"""Adaption prompts (LLaMA-Adapter, Zhang et al. 2023, arXiv:2303.16199): gated attention to n trained tokens.

y' = y + g W_o softmax(q (W_k P)^T / sqrt(d)) W_v P,  P of shape (n, hidden) and g = 0 at the start, in each top layer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import Adapter, method
from ..config import PeftConfig, PeftType
from ..errors import NotMergeableError
from ..layer import AdaptedLayer
from ..rows import BASE, take
from ..sites import Site
from ..state import State

if TYPE_CHECKING:
    from ..targets import Place


class Separate:
    """Attention with a projection each for rotated queries, keys and values, as Llama has it."""

    name, projection = "self_attn", "q_proj"

    @staticmethod
    def queries(attention: Any, x: Tensor, call: Mapping[str, Any]) -> Tensor:
        """(batch, heads, tokens, d), for a call with these further arguments."""
        q = _heads(attention.q_proj(x), attention.head_dim)
        cos, sin = (t.unsqueeze(1) for t in call["position_embeddings"])
        first, second = q.chunk(2, dim=-1)
        return q * cos + torch.cat((-second, first), dim=-1) * sin

    @staticmethod
    def pairs(attention: Any, prompt: Tensor) -> list[Tensor]:
        """Keys and values (batch, heads, n, d): the prompt has no positions, so that nothing is rotated."""
        found = (_heads(p(prompt), attention.head_dim) for p in (attention.k_proj, attention.v_proj))
        return [t.repeat_interleave(attention.num_key_value_groups, dim=1) for t in found]

    @staticmethod
    def output(attention: Any, y: Tensor) -> Tensor:
        return attention.o_proj(y)


class Fused:
    """Attention with one projection for all three, as GPT-2 has it. As in PEFT, its output projection is left out."""

    name, projection = "attn", "c_attn"

    @staticmethod
    def queries(attention: Any, x: Tensor, call: Mapping[str, Any]) -> Tensor:
        return _heads(attention.c_attn(x).chunk(3, dim=-1)[0], attention.head_dim)

    @staticmethod
    def pairs(attention: Any, prompt: Tensor) -> list[Tensor]:
        return [_heads(t, attention.head_dim) for t in attention.c_attn(prompt).chunk(3, dim=-1)[1:]]

    @staticmethod
    def output(attention: Any, y: Tensor) -> Tensor:
        return y


def _heads(x: Tensor, d: int) -> Tensor:
    """(batch, tokens, heads * d) -> (batch, heads, tokens, d)"""
    return x.unflatten(-1, (-1, d)).transpose(1, 2)


FORMS: dict[str, type[Separate | Fused]] = {"llama": Separate, "mistral": Separate, "gpt2": Fused}
"""How the attention of a transformers model type is made."""


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """Options of adaption prompts, under PEFT's names."""

    peft_type: PeftType | str | None = PeftType.ADAPTION_PROMPT
    target_modules: list[str] | set[str] | str | None = None
    """Name of the attention modules; None takes the model type's: "self_attn", of GPT-2 "attn"."""
    exclude_modules: list[str] | set[str] | str | None = field(default=None, init=False)
    adapter_len: int | None = None
    """Tokens of the prompt in each layer, 1 or more; the paper has 10. Without a default, as in PEFT."""
    adapter_layers: int | None = None
    """Layers with a prompt, counted from the top; the paper has 30 of Llama 7B's 32. Without a default, as in PEFT."""

    prompts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.target_modules, str | None):
            raise ValueError(f"target_modules={self.target_modules}: adaption prompts take one name, 'self_attn' say")

    def layers(self, model: nn.Module, places: Mapping[str, Place], state: State) -> list[tuple[Place, AdaptedLayer]]:
        for name in ("adapter_len", "adapter_layers"):
            value = getattr(self, name)
            if value is None or value < 1:
                raise ValueError(f"{name}={value}: AdaptionPromptConfig needs a number, 1 or more")
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in FORMS:
            known = ", ".join(FORMS)
            raise ValueError(f"Unsupported model type for adaption prompt: {model_type!r}; expected one of {known}")
        form = FORMS[model_type]
        self.target_modules = self.target_modules or form.name
        found = [place for path, place in places.items() if path.endswith(f".{self.target_modules}")]
        if len(found) < (self.adapter_layers or 0):
            raise ValueError(
                f"adapter_layers={self.adapter_layers}: the model has {len(found)} modules {self.target_modules!r}"
            )
        return [_layer(place, form, state) for place in found[-(self.adapter_layers or 0) :]]


class AttentionLayer(AdaptedLayer):
    """An attention module with adaption prompts, which see the queries and arguments of its call."""

    def __init__(self, base_layer: nn.Module, state: State, path: str, form: type[Separate | Fused]):
        super().__init__(base_layer, state, path)
        self.__dict__["form"] = form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        prompts = {n: a for n, a in self.adapters.items() if isinstance(a, AdaptionPrompt)}
        here = tuple(n for n in self.state.running if n in prompts)
        rows = self.state.rows
        if not here:
            return super().forward(*args, **kwargs)
        if rows is not None and any(self.adapters[n].whole for n in rows.adapters if n in self.adapters):
            raise ValueError(f"{self.path}: a mixed batch cannot have an adaption prompt and a copy of the same module")
        attention, form = self.replacement(), self.form
        y, *rest = attention(*args, **kwargs)
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        queries = form.queries(attention, x, kwargs)
        added = {n: prompts[n].added(attention, form, queries, rows is not None) for n in here}
        if rows is None:
            total = torch.stack([*added.values()]).sum(0)
        else:
            groups = rows.layout(x, self.path).groups(here, x.device)
            parts = [torch.zeros_like(take(y, i)) if n == BASE else take(added[n], i) for n, i in groups.parts]
            total = groups.join(parts)
        return (y + total.to(y.dtype), *rest)


def _layer(place: Place, form: type[Separate | Fused], state: State) -> tuple[Place, AdaptedLayer]:
    """The layer at a place, which may be new.

    Raises:
        ValueError: it is no attention, or another adapter trains it whole.
    """
    if isinstance(place.module, AttentionLayer):
        return place, place.module
    if isinstance(place.module, AdaptedLayer):
        raise ValueError(f"{place.path} is in modules_to_save of {list(place.module.adapters)}: add this adapter first")
    if not hasattr(place.module, form.projection):
        raise ValueError(f"{place.path} has no {form.projection}: name the attention modules, {form.name!r} say")
    return place, AttentionLayer(place.module, state, place.path, form)


@method(AdaptionPromptConfig)
class AdaptionPrompt(Adapter):
    def __init__(self, config: AdaptionPromptConfig, site: Site, path: str, device: torch.device, dtype: torch.dtype):
        super().__init__(config, site, path, device, dtype)
        self.adaption_prompt = self.new(1, config.adapter_len or 0, site.module.config.hidden_size)
        self.adaption_gate = self.new(1)

    def reset(self) -> None:
        nn.init.normal_(self.adaption_prompt)
        nn.init.zeros_(self.adaption_gate)

    def added(self, attention: nn.Module, form: type[Separate | Fused], queries: Tensor, by_rows: bool) -> Tensor:
        """What is added to the output of the attention. `by_rows`: its projections may differ by row."""
        prompt = self.adaption_prompt.to(queries.dtype)
        keys, values = form.pairs(attention, prompt.repeat(len(queries), 1, 1) if by_rows else prompt)
        keys, values = (t.to(queries.dtype).expand(len(queries), -1, -1, -1) for t in (keys, values))
        y = F.scaled_dot_product_attention(queries, keys, values)
        gated = self.strength * self.adaption_gate.to(y.dtype) * y.transpose(1, 2).flatten(2)
        return form.output(attention, gated)

    def check_mergeable(self) -> None:
        raise NotMergeableError(
            f"{self.config.peft_type} is attention to further tokens, which no change of weights can stand for"
        )
