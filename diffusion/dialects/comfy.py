"""ComfyUI's own names: `diffusion_model.` before the model's original path, `text_encoders.clip_l.transformer.`"""

from __future__ import annotations

import re

from .registry import Dialect, register

COMFY = register(Dialect("comfy", "ComfyUI", re.compile(r"^(diffusion_model|text_encoders)\.")))
