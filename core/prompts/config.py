"""What the configs of all prompt methods share, and how they take their sizes from a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..config import PeftConfig, TaskType

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..adapter import Adapter
    from ..layer import AdaptedLayer
    from ..state import State
    from ..targets import Place


@dataclass
class PromptLearningConfig(PeftConfig):
    """Options of virtual tokens. Sizes left as None are the model's."""

    target_modules: list[str] | set[str] | str | None = field(default=None, init=False)
    exclude_modules: list[str] | set[str] | str | None = field(default=None, init=False)
    num_virtual_tokens: int | None = None
    """Virtual tokens: 10 to 100 are usual. Without a default, since the sources' advice differs by task."""
    token_dim: int | None = None
    """Size of one token's embedding; of a prefix, of its keys in one layer."""
    num_transformer_submodules: int | None = None
    """2 makes tokens for an encoder and a decoder, 1 (None) for one of them. PEFT's default for encoder-decoder models
    is 2, but only multitask prompts ever use the decoder's half."""
    num_attention_heads: int | None = None
    """Attention heads; of a prefix, those of the keys."""
    num_layers: int | None = None
    """Layers that a prefix has keys and values for."""

    prompts: ClassVar[bool] = True
    own_keys: ClassVar[tuple[str, ...]] = ("prompt_embeddings", "prompt_encoder.")
    """How the names of a prompt's own tensors begin in files; others are modules saved whole."""

    of_cache: ClassVar[bool] = False
    """Whether the tokens are keys and values rather than embeddings."""

    def build(self, site: Any, path: str, device: torch.device, dtype: torch.dtype) -> Adapter:
        self.complete_for(site.sizes(self.of_cache))
        return self.adapter_class(self, site, path, device, dtype)

    def layers(self, model: nn.Module, places: Mapping[str, Place], state: State) -> list[tuple[Place, AdaptedLayer]]:
        from .layer import prompt_layer

        return [prompt_layer(model, places, state)]

    def complete_for(self, sizes: dict[str, int | None]) -> None:
        """Take what was left as None from a model's config.

        Raises:
            ValueError: the number of tokens is missing, or no size could be found.
        """
        if not self.num_virtual_tokens or self.num_virtual_tokens < 1:
            raise ValueError(
                f"num_virtual_tokens={self.num_virtual_tokens}: {type(self).__name__} needs the number of virtual "
                "tokens, 1 or more"
            )
        if self.num_transformer_submodules is None:
            self.num_transformer_submodules = 1
        if self.num_transformer_submodules not in (1, 2):
            raise ValueError(f"num_transformer_submodules={self.num_transformer_submodules}; expected 1 or 2")
        for name, found in sizes.items():
            if getattr(self, name) is None:
                setattr(self, name, found)
        missing = [f.name for f in fields(self) if f.name in sizes and getattr(self, f.name) is None]
        if missing:
            raise ValueError(f"Please specify {', '.join(missing)} in {type(self).__name__}: the model does not say")

    @property
    def total_virtual_tokens(self) -> int:
        """Tokens of all submodules together."""
        return (self.num_virtual_tokens or 0) * (self.num_transformer_submodules or 1)

    @property
    def for_classification(self) -> bool:
        """Whether one label is predicted for a whole row."""
        return self.task_type == TaskType.SEQ_CLS

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        return {k: v for k, v in values.items() if k not in ("target_modules", "exclude_modules")}

    def to_file(self, key: str) -> str:
        # PEFT's prompt models have no tuner between themselves and the base model
        return key if key.startswith(self.own_keys) else f"base_model.{key}"

    def from_file(self, key: str) -> str:
        return key.removeprefix("base_model.")
