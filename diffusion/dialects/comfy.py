"""ComfyUI's own names: `diffusion_model.` before the model's original path, `text_encoders.clip_l.transformer.`

The tensors are named as kohya's, which ComfyUI reads for every method, with `.alpha`, since it reads no metadata.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .names import Names, Spelling, bfl, dotted, kind_of, ldm
from .registry import Dialect, register

if TYPE_CHECKING:
    from torch import Tensor

    from .canonical import Canonical

_ENCODERS = {"clip": "clip_l", "clip_2": "clip_g", "t5": "t5xxl"}


def spelling(names: Names, component: str) -> Spelling:
    """What ComfyUI calls the modules of a component."""
    kind = kind_of(component, names.tables[component])
    if kind == "unet":
        return Spelling("diffusion_model.", ldm)
    if kind == "transformer":
        return Spelling("diffusion_model.", bfl if names.architecture == "flux" else dotted)
    encoder = "clip_h" if names.architecture == "sd2" else _ENCODERS[kind]
    return Spelling(f"text_encoders.{encoder}.transformer.")


def write(adapter: Canonical, names: Names) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a file for ComfyUI; it needs no metadata."""
    from .writing import by_module

    return by_module(adapter, names, spelling), {}


COMFY = register(Dialect("comfy", "ComfyUI", re.compile(r"^(diffusion_model|text_encoders)\."), write))
