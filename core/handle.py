"""From whatever a user holds to the adapters in it."""

from __future__ import annotations

from torch import nn

from .adapted import AdaptedModel
from .layer import AdaptedLayer


def handle_of(model: nn.Module) -> AdaptedModel:
    """The adapters of a `PeftModel`, an `AdaptedModel` or a model that was injected into.

    Raises:
        ValueError: it has none.
    """
    if isinstance(model, AdaptedModel):
        return model
    handle = getattr(model, "handle", None)
    if isinstance(handle, AdaptedModel):
        return handle
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    if not any(isinstance(m, AdaptedLayer) for m in model.modules()):
        raise ValueError(f"this {type(model).__name__} has no adapters")
    return AdaptedModel(model)
