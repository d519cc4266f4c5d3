"""XLabs' Flux files: `double_blocks.0.processor.qkv_lora1.down.weight`, no alphas."""

from __future__ import annotations

import re

from .registry import Dialect, register

XLABS = register(Dialect("xlabs", "XLabs", re.compile(r"^(double|single)_blocks\.\d+\.processor\.\w+_lora\d?\.")))
