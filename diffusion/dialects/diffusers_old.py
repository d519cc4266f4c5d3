"""diffusers before 0.26: `attn1.processor.to_q_lora.down.weight`, `q_proj.lora_linear_layer.up.weight`, no alphas."""

from __future__ import annotations

import re

from .registry import Dialect, register

DIFFUSERS_OLD = register(
    Dialect(
        "diffusers-old",
        "diffusers, old attention processors",
        re.compile(r"\.processor\.to_\w+_lora\.|\.(lora|lora_linear_layer)\.(down|up)\."),
    )
)
