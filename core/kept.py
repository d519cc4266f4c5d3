"""Parameters that a merge replaced, waiting to be put back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .quantized import moved


class Kept:
    """A parameter taken out of its module by a merge, to be put back as the very same bits.

    `keep` says where it waits: "device" holds on to the parameter itself, "cpu" to a copy off the accelerator, "none"
    to nothing. A parameter that somebody else still holds (a tied weight) is put back itself, which ties it again.
    """

    def __init__(self, parameter: nn.Parameter, keep: str):
        self.requires_grad = parameter.requires_grad
        stays = keep == "device" or (keep == "cpu" and parameter.device.type == "cpu")
        self.parameter = parameter if stays else None
        self.elsewhere: Callable[[], Any] = weakref.ref(parameter) if keep != "overwritten" else _nothing
        self.copy = moved(parameter, "cpu").requires_grad_(self.requires_grad) if keep == "cpu" and not stays else None

    @property
    def original(self) -> nn.Parameter | None:
        """The parameter, or its copy, or None if nothing was kept."""
        found: tuple[Any, ...] = (self.parameter, self.elsewhere(), self.copy)
        return next((tensor for tensor in found if tensor is not None), None)

    def restore(self, like: Tensor) -> nn.Parameter:
        """The original on the device and in the dtype of `like`."""
        original = self.original
        assert original is not None
        if (original.device, original.dtype) == (like.device, like.dtype):
            return original
        restored = moved(original, like.device, like.dtype)
        restored.requires_grad = self.requires_grad
        return restored

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"elsewhere": _nothing}


def _nothing() -> None:
    """Stands for a weak reference in a copy or a pickle."""
