"""kohya's sd-scripts and LyCORIS: `lora_unet_….lora_down.weight`, an `.alpha` for each module, `ss_` metadata.

SDXL's UNet goes by Stability's names, Flux by Black Forest Labs'; everything else by diffusers'. OneTrainer writes the
same keys.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from .names import Names, Spelling, bfl, dotted, kind_of, ldm
from .registry import Dialect, register

if TYPE_CHECKING:
    from torch import Tensor

    from .canonical import Canonical

ALGORITHMS = {"lora": "locon", "oft": "diag-oft"}
"""LyCORIS' names for methods, where they differ from ours."""
_VERSIONS = {
    "sd1": ("sd_v1", "stable-diffusion-v1/lora"),
    "sd2": ("sd_v2", "stable-diffusion-v2-512/lora"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    "flux": ("flux1", "flux-1-dev/lora"),
}
"""Family -> `ss_base_model_version` and `modelspec.architecture`, by which programs tell what a file is for."""


def spelling(names: Names, component: str) -> Spelling:
    """How kohya's programs call the modules of a component."""
    kind = kind_of(component, names.tables[component])
    if kind == "unet":
        return Spelling("lora_unet_", ldm if names.is_sdxl else dotted, flat=True)
    if kind == "transformer":
        return Spelling("lora_unet_", bfl if names.architecture == "flux" else dotted, flat=True)
    if kind == "t5":
        return Spelling("lora_te3_", flat=True)
    alone = not names.is_sdxl and "transformer" not in names.tables
    return Spelling("lora_te_" if alone else f"lora_te{2 if kind == 'clip_2' else 1}_", flat=True)


def write(adapter: Canonical, names: Names) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file for kohya's programs, the web UIs and LyCORIS."""
    import torch

    from .writing import by_module, common_rank

    tensors = by_module(adapter, names, spelling)
    algorithms = sorted({ALGORITHMS.get(layer.method, layer.method) for layer in adapter.layers().values()})
    plain = algorithms == ["locon"] and not any("lora_mid" in key or "dora_scale" in key for key in tensors)
    rank = common_rank(adapter)
    # LyCORIS writes the dim as the alpha of a LoKr of two full factors, and ignores it
    full = [key.removesuffix("lokr_w1") for key in tensors if key.endswith(".lokr_w1")]
    tensors |= {f"{name}alpha": torch.tensor(float(rank)) for name in full if f"{name}lokr_w2" in tensors}
    metadata = {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_network_args": json.dumps({} if plain else {"algo": ", ".join(algorithms)}),
    }
    if version := _VERSIONS.get(names.architecture):
        metadata |= {"ss_base_model_version": version[0], "modelspec.architecture": version[1]}
    return tensors, metadata


KOHYA = register(Dialect("kohya", "kohya / LyCORIS", re.compile(r"^(lora_(unet|te\d?|transformer)|lycoris)_"), write))
