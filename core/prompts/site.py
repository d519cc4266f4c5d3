"""Where prompts enter a transformers model: its backbone, and the sizes that its config states."""

from __future__ import annotations

from typing import Any

import torch

from ..sites import Site
from .entry import Signature


class PromptSite(Site):
    """Where prompts enter a transformers model.

    Raises:
        ValueError: the model is none that can be entered.
    """

    def __init__(self, model: Any):
        super().__init__(model)
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_input_embeddings"):
            raise ValueError(
                f"a {type(model).__name__} has no config and get_input_embeddings(): prompts enter transformers models"
            )
        if hasattr(config, "get_text_config") and not config.is_encoder_decoder:
            config = config.get_text_config()
        self.config: Any = config
        if getattr(config, "is_encoder_decoder", False):
            self.backbone, self.decoder = model.get_encoder(), model.get_decoder()
        else:
            inner = getattr(model, "base_model", model)
            self.backbone, self.decoder = getattr(inner, "language_model", inner), None
        self.signature = Signature(self.backbone)
        self.decoder_signature = None if self.decoder is None else Signature(self.decoder)
        self.causal = any(getattr(m, "is_causal", False) is True for m in self.backbone.modules())

    @property
    def embeddings(self) -> Any:
        """The module that turns token ids into embeddings."""
        return self.backbone.get_input_embeddings()

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        weight = next(self.embeddings.parameters())
        return weight.device, weight.dtype

    def sizes(self, of_cache: bool) -> dict[str, int | None]:
        """The sizes that configs leave to the model: of its embeddings, or of one layer's keys (`of_cache`)."""
        config = self.config
        of_decoder = _DECODER if self.decoder is not None else ((), ())
        heads = _first(config, *of_decoder[0], "num_attention_heads")
        layers = _first(config, *of_decoder[1], "num_hidden_layers", "num_layers", "n_layer")
        if not of_cache:
            width = getattr(self.embeddings, "embedding_dim", None) or next(self.embeddings.parameters()).shape[-1]
            return {"token_dim": width, "num_attention_heads": heads, "num_layers": layers}
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
        if head is None and heads:
            head = config.hidden_size // heads
        return {
            "token_dim": kv_heads * head if kv_heads and head else None,
            "num_attention_heads": kv_heads,
            "num_layers": layers,
        }


_DECODER = ("decoder_attention_heads",), ("decoder_layers", "num_decoder_layers")
"""What decoders call their heads and layers, where not as others."""


def _first(config: Any, *names: str) -> int | None:
    return next((v for n in names if (v := getattr(config, n, None)) is not None), None)
