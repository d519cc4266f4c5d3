"""`pytorch_lora_weights.safetensors`: LoRA and DoRA of all components in one file, as diffusers reads and writes it.

Keys are `<component>.<module path>.lora_A.weight`. Rank, alpha and the rest of each config stand in the header under
`lora_adapter_metadata`, flat: `unet.r`, `unet.lora_alpha`, ... Many programs read no header, and take alpha = rank. So
the scale is multiplied into B here, and the header says alpha = rank: all readers agree.

CLIP's modules are written with the `text_model.` that they had before transformers 5: every diffusers reads that.
DoRA's magnitudes are written with the `.weight` that they have in a live model: without it transformers leaves those of
the text encoder at their initial values, with no more than a note in the log.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from .canonical import CONFIGS, Canonical, Layer, Shape
from .names import COMPONENTS, Names, clip_path
from .registry import Dialect, register

if TYPE_CHECKING:
    from torch import Tensor

FILE_NAME = "pytorch_lora_weights.safetensors"
_FIELDS = (
    *("r", "lora_alpha", "target_modules", "use_dora", "lora_bias"),
    *("rank_pattern", "alpha_pattern"),
)
"""Config fields that decide what the tensors mean; all are known to `peft.LoraConfig`."""


def why_not(adapter: Canonical) -> str | None:
    """Why diffusers' format cannot hold an adapter, or None if it can."""
    for (component, path), layer in adapter.layers().items():
        if layer.method != "lora":
            return f"{component}.{path} has a {layer.method}, and diffusers' files hold LoRA and DoRA only"
        if "dora_in" in layer.factors:
            return f"{component}.{path} has the magnitudes of input channels, and diffusers' DoRA has those of rows"
    return None


def write(adapter: Canonical, names: Names | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file for diffusers.

    Arguments:
        names: None if the factors have the shapes of their layers already.
    """
    reason = why_not(adapter)
    if reason:
        raise ValueError(f"{reason}: convert to LoRA first (--method lora --rank N)")
    tensors, header = {}, {}
    for component, layers in adapter.components.items():
        from .forms import formed
        from .peft_dir import one_config, targets

        table = names.tables[component] if names else {}
        unscaled = {path: baked(layer) for path, layer in layers.items()}
        shapes = {path: table.get(path) or _shape(layer) for path, layer in unscaled.items()}
        forms = {path: formed(layer, path, shapes[path]) for path, layer in unscaled.items()}
        config = one_config(component, {path: config for path, (config, _) in forms.items()}, shapes)
        flat = {clip_path(path, nested=False) for path in layers}  # as suffixes they match either CLIP
        config.target_modules = targets(flat, [clip_path(path, nested=False) for path in table]) if table else flat
        header |= {f"{component}.{name}": value for name, value in _values(config.to_dict()).items()}
        for path, (_, own) in forms.items():
            tensors |= {f"{component}.{path}.{_written(slot)}": tensor for slot, tensor in own.items()}
    return tensors, {CONFIGS: json.dumps(header, sort_keys=True)}


def baked(layer: Layer) -> Layer:
    """A LoRA of scale 1."""
    from ...core.adapter import wide

    if layer.scale == 1:
        return layer
    ours = ("lora_B.weight", "lora_B.bias")
    factors = {k: (layer.scale * wide(t)).to(t.dtype) if k in ours else t for k, t in layer.factors.items()}
    return Layer("lora", factors)


def _shape(layer: Layer) -> Shape:
    return layer.factors["lora_B.weight"].shape[0], *layer.factors["lora_A.weight"].shape[1:]


def _values(config: dict[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in _FIELDS if config.get(name) is not None}


def _written(slot: str) -> str:
    return f"{slot}.weight" if slot == "lora_magnitude_vector" else slot


DIFFUSERS = register(Dialect("diffusers", "diffusers", re.compile(rf"^({'|'.join(COMPONENTS)})\."), write))
