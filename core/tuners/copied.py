"""Modules trained whole (`modules_to_save`): the adapter is a private copy of its module."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..adapter import Adapter, Slot
from ..config import PeftConfig
from ..dispatch import whole_copy
from ..quantized import plain
from ..sites import Site


class Copied(Adapter):
    """Runs in place of its module, in full precision where that is quantized.

    Stored under the plain names of the module's own tensors.
    """

    def __init__(self, config: PeftConfig, site: Site, path: str, device: torch.device, dtype: torch.dtype):
        super().__init__(config, site, path, device, dtype)
        self.module = plain(whole_copy(site.module)).requires_grad_(False)

    @property
    def whole(self) -> nn.Module:
        return self.module

    def reset(self) -> None:
        """It starts as its module."""

    def neutralise(self) -> None:
        self.module.load_state_dict(plain(whole_copy(self.site.module)).state_dict())

    def slots(self) -> Iterator[Slot]:
        return ((name.removeprefix("module."), held, key) for name, held, key in super().slots())
