"""An adapter whose layers have a config each, so that they may differ in method, rank, scale and form.

Files of other programs mix methods (LyCORIS presets: LoKr here, LoCon there, a full difference for the norms) and keep
a scale for every module. To the core such a file is one adapter like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..adapter import Adapter
from ..config import PeftConfig
from ..sites import Site


@dataclass
class LayerwiseConfig(PeftConfig):
    """No method of its own: `layers` says which layer is adapted how."""

    layers: dict[str, PeftConfig] = field(default_factory=dict)
    """Exact module path -> the config of that layer."""

    norms: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules: Any = self.layers

    def build(self, site: Site, path: str, device: torch.device, dtype: torch.dtype) -> Adapter:
        config = self.layers[path]
        if site.elementwise and not config.norms:
            raise ValueError(f"{path}: a {config.peft_type} cannot adapt a {type(site.module).__name__}")
        return config.build(site, path, device, dtype)
