"""kohya's sd-scripts and LyCORIS: `lora_unet_….lora_down.weight`, an `.alpha` for each module, `ss_` metadata.

SDXL's UNet goes by Stability's names, Flux by Black Forest Labs'; everything else by diffusers'. OneTrainer writes the
same keys.
"""

from __future__ import annotations

import re

from .registry import Dialect, register

KOHYA = register(Dialect("kohya", "kohya / LyCORIS", re.compile(r"^(lora_(unet|te\d?|transformer)|lycoris)_")))
