"""Parameters that a merge replaced, waiting to be put back."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn


class Kept:
    """A parameter taken out of its module by a merge, to be put back as the very same bits.

    `keep` says where it waits: "device" holds on to the parameter itself, "cpu" to a copy off the accelerator, "none"
    to nothing. A parameter that somebody else still holds (a tied weight) is put back itself, which ties it again.
    """

    def __init__(self, parameter: nn.Parameter, keep: str):
        self.requires_grad = parameter.requires_grad
        stays = keep == "device" or (keep == "cpu" and parameter.device.type == "cpu")
        self.parameter = parameter if stays else None
        self.elsewhere = weakref.ref(parameter) if keep != "overwritten" else _nothing
        self.copy = parameter.detach().to("cpu", copy=True) if keep == "cpu" and not stays else None

    @property
    def original(self) -> Tensor | None:
        """The parameter, or its copy, or None if nothing was kept."""
        found = (self.parameter, self.elsewhere(), self.copy)
        return next((tensor for tensor in found if tensor is not None), None)

    def restore(self, like: Tensor) -> nn.Parameter:
        """The original on the device and in the dtype of `like`."""
        original = self.original
        assert original is not None
        if isinstance(original, nn.Parameter) and (original.device, original.dtype) == (like.device, like.dtype):
            return original
        return nn.Parameter(original.detach().to(like), requires_grad=self.requires_grad)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"elsewhere": _nothing}


def _nothing() -> None:
    """Stands for a weak reference in a copy or a pickle."""
