"""Names that differ between libraries' versions though they mean the same module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Parts of a pipeline that an adapter file may hold."""

_TEXT_MODEL = "text_model."
_CLIP_INNER = ("encoder.layers.", "embeddings.", "final_layer_norm.")


def clip_path(key: str, *, nested: bool) -> str:
    """A key of CLIP's text encoder with (`nested`) or without the `text_model.` that transformers 5 took away.

    >>> clip_path("encoder.layers.0.mlp.fc1.lora_A.weight", nested=True)
    'text_model.encoder.layers.0.mlp.fc1.lora_A.weight'
    >>> clip_path("down_blocks.0.attentions.0.proj_in.lora_A.weight", nested=True)
    'down_blocks.0.attentions.0.proj_in.lora_A.weight'
    """
    inner = key.removeprefix(_TEXT_MODEL)
    if not inner.startswith(_CLIP_INNER):
        return key
    return _TEXT_MODEL + inner if nested else inner


def fit_names(tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """`tensors` under the module paths of this very `model`."""
    nested = hasattr(model, "text_model")
    return {clip_path(key, nested=nested): tensor for key, tensor in tensors.items()}
