"""`pytorch_lora_weights.safetensors`: LoRA and DoRA of all components in one file, as diffusers reads and writes it.

Keys are `<component>.<module path>.lora_A.weight`. Rank, alpha and the rest of each config stand in the header under
`lora_adapter_metadata`, flat: `unet.r`, `unet.lora_alpha`, ... A file without that header means alpha = rank.

CLIP's modules are written with the `text_model.` that they had before transformers 5: every diffusers reads that.
DoRA's magnitudes are written with the `.weight` that they have in a live model: without it transformers leaves those of
the text encoder at their initial values, with no more than a note in the log.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .names import COMPONENTS, clip_path
from .registry import Dialect, register

if TYPE_CHECKING:
    from torch import Tensor

    from ...core import LoraConfig, PeftConfig
    from ..adapters import Adapters

DIFFUSERS = register(Dialect("diffusers", "diffusers", re.compile(rf"^({'|'.join(COMPONENTS)})\.")))

FILE_NAME = "pytorch_lora_weights.safetensors"
_HEADER = "lora_adapter_metadata"
_MAGNITUDE = ".lora_magnitude_vector"
_FIELDS = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "use_dora", "lora_bias", "bias"),
    *("rank_pattern", "alpha_pattern", "lora_dropout", "base_model_name_or_path"),
)
"""Config fields that decide what the tensors mean; all are known to `peft.LoraConfig`."""


def can_express(adapters: Adapters) -> bool:
    """diffusers' format knows LoRA and DoRA only, and no trained biases."""
    from ...core import LoraConfig

    return all(isinstance(config, LoraConfig) and config.bias == "none" for config, _ in adapters.values())


def write_diffusers_file(path: Path, adapters: Adapters, metadata: dict[str, str] | None = None) -> None:
    """Write all of `adapters` to the file `path`, atomically; `metadata` joins the header."""
    from ...core import files

    tensors, header = {}, {}
    for name, (config, parts) in adapters.items():
        values = config.to_dict()
        header |= {f"{name}.{field}": values[field] for field in _FIELDS if values.get(field) is not None}
        tensors |= {f"{name}.{_written(key)}": tensor for key, tensor in parts.items()}
    files.write_tensors(path, tensors, {**(metadata or {}), _HEADER: json.dumps(header, sort_keys=True)})


def read_diffusers_file(path: Path) -> Adapters:
    """Adapters of a file in diffusers' format, its module paths as written."""
    from ...core import files

    header = json.loads(files.read_metadata(path).get(_HEADER, "{}"))
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in files.read_tensors(path).items():
        component, _, inner = key.partition(".")
        if component not in COMPONENTS or ".lora_" not in inner:
            raise ValueError(f"{path} is not a LoRA file in diffusers' format: it holds {key!r}")
        parts.setdefault(component, {})[_read(inner)] = tensor
    return {name: (_config(_under(header, name), inner), inner) for name, inner in parts.items()}


def _written(key: str) -> str:
    key = clip_path(key, nested=True)
    return f"{key}.weight" if key.endswith(_MAGNITUDE) else key


def _read(key: str) -> str:
    return key.removesuffix(".weight") if key.endswith(f"{_MAGNITUDE}.weight") else key


def _under(header: dict[str, Any], component: str) -> dict[str, Any]:
    return {k.removeprefix(f"{component}."): v for k, v in header.items() if k.startswith(f"{component}.")}


def _config(values: dict[str, Any], tensors: dict[str, Tensor]) -> LoraConfig:
    """The config in the header; without one, ranks from the shapes and alpha = rank."""
    from ...core import LoraConfig, PeftConfig
    from ...core.tuners.lora import lora_config

    if values:
        config = LoraConfig.from_dict({**values, "peft_type": "LORA"})
        assert isinstance(config, LoraConfig)
        return config
    ranks = {key.split(".lora_A")[0]: tensor.shape[0] for key, tensor in tensors.items() if ".lora_A" in key}
    dora = any(_MAGNITUDE in key for key in tensors)
    return replace(lora_config(PeftConfig(), ranks), use_dora=dora)
