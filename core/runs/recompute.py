"""Gradient checkpointing, under the names that it has had."""

from __future__ import annotations

from typing import Any


def recompute_activations(model: Any) -> None:
    """Recompute activations in the backward pass. Not reentrant, so that adapters get gradients although their inputs
    have none."""
    if hasattr(model, "enable_gradient_checkpointing"):  # diffusers, where it is never reentrant
        model.enable_gradient_checkpointing()
    elif hasattr(model, "activation_checkpointing_enable"):  # transformers since 5
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
